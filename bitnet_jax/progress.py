"""Progress of long tasks: a bar if stderr is a terminal, otherwise an occasional line.

A bar redraws itself with carriage returns, which would fill a log file with thousands of lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, runtime_checkable

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines


@runtime_checkable
class Progress(Protocol):
    """The interface of a progress display; a context manager that shows the last state on exit."""

    def update(self, n: int = 1) -> None:
        """Report `n` more completed units."""

    def set_postfix(self, values: Mapping[str, str], refresh: bool = True) -> None:
        """Set the values shown after the count, from the next update on."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None: ...


def progress_bar(
    total: int | None,
    *,
    unit: str,
    description: str = "",
    initial: int = 0,
    show: bool = True,
    delay: float = 0.0,
) -> Progress:
    """A tqdm bar on a terminal, lines otherwise, nothing unless `show`; nothing before `delay` seconds.

    Without a total, only what is done is counted.
    """
    if show and not sys.stderr.isatty():
        return _Lines(total, unit, description, initial, delay)
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        desc=description or None,
        initial=initial,
        disable=not show,
        dynamic_ncols=True,
        delay=delay,
        leave=not delay,
    )


class _Lines:
    """`first: 120/400 step, loss 2.31, 0:01:05 elapsed, about 0:02:31 left`"""

    def __init__(self, total: int | None, unit: str, description: str, initial: int, delay: float):
        self.total, self.unit, self.description = total, unit, description
        self.initial = self.done = initial
        self.values: Mapping[str, str] = {}
        self.delay, self.began = delay, time.monotonic()
        self.shown = self.began
        self.last_shown: int | None = None  # `done` in the newest line

    def update(self, n: int = 1) -> None:
        self.done += n
        if time.monotonic() - self.shown >= LINE_SECONDS:
            self._show()

    def set_postfix(self, values: Mapping[str, str], refresh: bool = True) -> None:
        self.values = dict(values)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.done not in (self.initial, self.last_shown) and time.monotonic() - self.began >= self.delay:
            self._show()

    def _show(self) -> None:
        self.shown, self.last_shown = time.monotonic(), self.done
        elapsed, new = self.shown - self.began, self.done - self.initial
        count = (
            f"{self.done:,} {self.unit}"
            if self.total is None
            else f"{self.done:,}/{self.total:,} {self.unit}"
        )
        parts = [f"{self.description}: {count}" if self.description else count]
        parts += [f"{name} {value}" for name, value in self.values.items()]
        parts.append(f"{_clock(elapsed)} elapsed")
        if self.total is not None and new > 0 and self.done < self.total:
            parts.append(f"about {_clock(elapsed / new * (self.total - self.done))} left")
        print(", ".join(parts), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
