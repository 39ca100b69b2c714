"""How far a long task is: a bar where stderr is a terminal, elsewhere a plain line now and then.

A bar redraws itself with carriage returns, which fill the log of a redirected run with thousands of its states.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines


class Progress(Protocol):
    """What a task calls; a context manager, the end of which shows the last state."""

    def update(self, n: int = 1) -> None:
        """`n` more units are done."""

    def set_postfix(self, values: Mapping[str, str], refresh: bool = True) -> None:
        """What is shown behind the count from the next update on."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None: ...


def progress_bar(
    total: int,
    *,
    unit: str,
    description: str = "",
    initial: int = 0,
    show: bool = True,
    delay: float = 0.0,
) -> Progress:
    """A tqdm bar on a terminal, lines elsewhere, nothing unless `show`, nor of a task that ends within `delay` seconds."""
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
    """`first: 120/400 step, loss 2.31, 0:01:05 passed, about 0:02:31 left`"""

    def __init__(self, total: int, unit: str, description: str, initial: int, delay: float):
        self.total, self.unit, self.description = total, unit, description
        self.initial = self.done = initial
        self.values: Mapping[str, str] = {}
        self.delay, self.began = delay, time.monotonic()
        self.shown = self.began
        self.told: int | None = None  # `done` of the newest line

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
        if self.done not in (self.initial, self.told) and time.monotonic() - self.began >= self.delay:
            self._show()

    def _show(self) -> None:
        self.shown, self.told = time.monotonic(), self.done
        passed, new = self.shown - self.began, self.done - self.initial
        count = f"{self.done:,}/{self.total:,} {self.unit}"
        parts = [f"{self.description}: {count}" if self.description else count]
        parts += [f"{name} {value}" for name, value in self.values.items()]
        parts.append(f"{_clock(passed)} passed")
        if new > 0 and self.done < self.total:
            parts.append(f"about {_clock(passed / new * (self.total - self.done))} left")
        print(", ".join(parts), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
