"""Decoding beside busy processes: they keep processors busy, and end with the measurement."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest

from experiments import neighbour


def test_busy_processes_end_with_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def recorded(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)

    def interrupted() -> None:
        with neighbour.busy(2):
            time.sleep(0.5)
            assert [process.poll() for process in started] == [None, None]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(process.poll() is not None for process in started)
