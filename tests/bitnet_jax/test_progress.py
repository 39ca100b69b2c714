"""Progress on a terminal, in a log, and disabled."""

from __future__ import annotations

import io
import sys

import pytest

from bitnet_jax import progress
from bitnet_jax.progress import progress_bar


class Clock:
    """A fake time.monotonic that advances only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_at_intervals(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(1000, unit="step", description="first", initial=100) as bar:
        for _ in range(480):
            clock.now += 0.125
            bar.set_postfix({"loss": "2.5"}, refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "first: 340/1,000 step, loss 2.5, 0:00:30 elapsed, about 0:01:22 left",
        "first: 580/1,000 step, loss 2.5, 0:01:00 elapsed, about 0:00:52 left",
    ]


def test_completion_is_logged_once_and_only_after_progress(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(2, unit="text") as bar:
        bar.update(2)
    assert capsys.readouterr().err == "2/2 text, 0:00:00 elapsed\n"
    with progress_bar(2, unit="text", initial=2):
        pass
    assert capsys.readouterr().err == ""


def test_a_failure_shows_the_progress_so_far(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), progress_bar(9, unit="text") as bar:  # noqa: PT012
        bar.update(4)
        raise ValueError("broken")
    assert capsys.readouterr().err.startswith("4/9 text")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(3, unit="step") as bar:
        bar.update(3)
    assert "\r" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar(3, unit="step", show=False) as bar:
        bar.set_postfix({"loss": "1"})
        bar.update(3)
    assert capsys.readouterr().err == ""
