"""SIGINT and SIGTERM as a stop request that the training loop checks between updates."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(SystemExit):
    """A signal stopped the run, its state is saved. Unless caught, the process ends with 128 + signal."""


class StopRequest:
    """`signal` is None until a signal has arrived."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While open, the first SIGINT or SIGTERM only sets the request; the next acts as it would have without this.

    Python delivers signals to the main thread alone; in another thread the request stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in watched}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()

    for number in watched:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
