"""How far a long preparation is, on stderr: a bar on a terminal, else a line now and then; nothing if it is short."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

FIRST, EVERY = 1.0, 10.0  # seconds until a bar shows, and between two lines


class Progress:
    """`with Progress("tokenizing", total_bytes) as progress: progress.update(bytes_done)`"""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._next_line = time.monotonic() + EVERY
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=what,
            unit="B",
            unit_scale=True,
            delay=FIRST,
            leave=False,
            dynamic_ncols=True,
            disable=not self._terminal,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        self._done += count
        self._bar.update(count)
        if not self._terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + EVERY
            print(
                f"{self._what}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB",
                file=sys.stderr,
                flush=True,
            )
