"""SIGINT and SIGTERM as a stop request that the training loop checks between updates."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(SystemExit):
    """A signal stopped the run after its state was saved. If uncaught, the exit status is 128 + signal."""


class StopRequest:
    """`signal` is None until a signal has arrived."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the context, the first SIGINT or SIGTERM only sets the request; the next is handled as before.

    Python delivers signals only to the main thread; in any other thread the request stays unset.
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
