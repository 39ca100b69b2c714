"""SIGINT and SIGTERM as a wish that the loop looks at between updates."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(SystemExit):
    """A signal stopped the run, its state is saved. Unless caught, the process ends with 128 + signal."""


class StopWish:
    """`signal` is None until one came."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopWish]:
    """While open, the first SIGINT or SIGTERM only sets the wish; the next acts as it would have without us.

    Python delivers signals to the main thread alone; in another thread the wish stays unset.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in watched}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        wish.signal = signal.Signals(number)
        restore()

    for number in watched:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        restore()
