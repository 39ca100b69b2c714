"""Runs below a folder: finished, unfinished, running and damaged ones are listed, and nothing changes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.training import RunConfig, RunError
from bitnet_jax.training.loop import train
from bitnet_jax.training.run_folder import RunFolder
from bitnet_jax.training.runs import differing_settings, list_runs
from bitnet_jax.training.task import Task

Config = Callable[..., RunConfig]


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def place(toy: Task, tmp_path: Path, run_config: Config) -> Path:
    for name, rate, steps in (("first", 0.01, 4), ("deeper/second", 0.1, 4), ("stopped", 0.01, 6)):
        config = run_config(optimizer=dict(learning_rate=rate), training=dict(steps=steps))
        folder = RunFolder(tmp_path / name)
        with folder.training(config):
            train(toy, config, folder, progress=False)
    (tmp_path / "stopped" / "result.json").unlink()
    for name, damage in (("broken", "{"), ("strange", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 3}\n{"ste')
        (tmp_path / name / "config.json").write_text(damage)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text("{}")  # the folder of a model is no run
    return tmp_path


def test_every_run_is_listed_whatever_its_state_and_nothing_changes(place: Path) -> None:
    before = content(place)
    rows = {row["run"]: row for row in list_runs(place)}
    assert list(rows) == ["broken", "deeper/second", "first", "stopped", "strange"]
    assert rows["first"]["status"] == "finished"
    assert rows["first"]["loss"] == json.loads((place / "first" / "result.json").read_text())["valid"]["loss"]
    assert 0 < rows["first"]["goodput"] < 1
    stopped = rows["stopped"]
    assert (stopped["status"], stopped["step"], stopped["steps"]) == ("unfinished", 6, 6)
    assert stopped["loss"] is not None, "from its metrics"
    assert stopped["goodput"] is not None, "from record.json"
    assert rows["broken"]["status"] == rows["strange"]["status"] == "damaged"
    assert "config.json cannot be read" in rows["broken"]["problem"]
    with RunFolder(place / "first").lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert {row["run"]: row for row in list_runs(place)}["stopped"]["status"] == "unfinished"
    assert content(place) == before
    losses = [row["loss"] for row in list_runs(place, sort="loss")]
    assert losses == [*sorted(losses[:3]), None, None]


def test_a_locked_run_is_running(place: Path) -> None:
    folder = RunFolder(place / "stopped")
    with folder.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = {row["run"]: row["status"] for row in list_runs(place)}["stopped"]
    assert status == "running"


def test_the_settings_that_differ(place: Path) -> None:
    runs = {name: place / name for name in ("first", "deeper/second", "stopped")}
    assert differing_settings(runs) == {
        "optimizer.learning_rate": {"first": 0.01, "deeper/second": 0.1, "stopped": 0.01},
        "training.steps": {"first": 4, "deeper/second": 4, "stopped": 6},
    }
    with pytest.raises(RunError, match=r"config.json cannot be read"):
        differing_settings({"broken": place / "broken"})


def test_the_command_lists_and_compares(place: Path, capsys: Any) -> None:
    assert cli.main(["runs", str(place), "--sort", "tokens/s", "--json", str(place / "runs.json")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:2] == ["run", "status"]
    assert "broken: " in out
    assert len(json.loads((place / "runs.json").read_text())["runs"]) == 5
    assert cli.main(["runs", str(place), "--compare", "first", "deeper/second"]) == 0
    out = capsys.readouterr().out
    assert "optimizer.learning_rate" in out
    assert "training.steps" not in out
    for wrong, message in (
        (["--sort", "los"], "--sort"),
        (["--compare", "first"], "at least two runs"),
        (["--compare", "first", "secnd"], "secnd"),
    ):
        assert cli.main(["runs", str(place), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["runs", str(place / "absent")]) == 2
    assert cli.main(["runs", str(place / "packed")]) == 0
    assert "no runs" in capsys.readouterr().out
