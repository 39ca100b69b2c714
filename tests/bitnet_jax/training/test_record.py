"""The record of a run: every second of every process is accounted once, lost updates are not productive."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from bitnet_jax.evaluation.meters import Meter
from bitnet_jax.training import RunConfig, record
from bitnet_jax.training.hardware import Peak, peak_flops
from bitnet_jax.training.loop import train
from bitnet_jax.training.record import RunRecord, Work
from bitnet_jax.training.run_folder import RunFolder
from bitnet_jax.training.summary import summary
from bitnet_jax.training.task import Task

Config = Callable[..., RunConfig]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(record, "time", clock)
    monkeypatch.setattr(
        record, "open_meters", lambda: ([Meter("meter", lambda: 3 * clock.now % 100, 100.0)], {})
    )
    return clock


def process(file: Path, clock: Clock, saved: Any, run: str = "a") -> RunRecord:
    return RunRecord(file, run, Work(10, 50.0, Peak(1000.0, "of this test")), [], clock.now, saved)


def do(of: RunRecord, clock: Clock, activity: str, seconds: float, updates: int = 0) -> None:
    of.enter(activity)
    for _ in range(updates):
        clock.now += seconds / updates
        of.updated()
    clock.now += 0 if updates else seconds


def test_updates_after_the_checkpoint_of_a_killed_process_are_lost(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "record.json"
    first = process(file, clock, None)
    clock.now += 5  # setup
    do(first, clock, "compilation", 7)
    do(first, clock, "training", 40, updates=4)
    do(first, clock, "checkpointing", 1)
    saved = json.loads(json.dumps(first.state()))
    do(first, clock, "training", 30, updates=3)
    first.enter("evaluation")
    clock.now += 2  # killed before anything else is written: these seconds are unknown

    clock.now += 1000  # nobody trains
    second = process(file, clock, saved)
    clock.now += 6
    do(second, clock, "training", 20, updates=2)
    second.close()
    found = second.summary()
    assert found["starts"] == 2
    assert found["updates"] == 4 + 2
    expected = {
        "setup": 11,
        "compilation": 7,
        "training": 60,
        "evaluation": 0,
        "checkpointing": 1,
        "lost": 30,
    }
    assert found["seconds"] == pytest.approx(expected)
    assert found["wall_seconds"] == pytest.approx(109)
    assert found["goodput"] == pytest.approx(60 / 109)
    assert found["tokens_per_second"] == pytest.approx(1.0)
    assert found["mfu"] == pytest.approx(0.05)
    assert found["joules"] == {"meter": pytest.approx(3 * 109)}, (
        "lost updates cost energy, a counter may wrap"
    )
    assert found["joules_per_token"] == pytest.approx(3 * 109 / 60)
    assert json.loads(file.read_text())["summary"] == found


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"totals": 3}', '{"totals": {"seconds": 3}}'])
def test_a_damaged_file_or_that_of_another_run_is_ignored(tmp_path: Path, clock: Clock, content: str) -> None:
    file = tmp_path / "record.json"
    file.write_text(content)
    assert process(file, clock, None).totals.starts == 1
    process(file, clock, None).close()
    assert process(file, clock, None, run="a").totals.starts == 2
    assert process(file, clock, None, run="b").totals.starts == 1


def test_a_run_that_failed_after_a_checkpoint_records_its_second_start(
    toy: Task, tmp_path: Path, run_config: Config
) -> None:
    config = run_config(training=dict(steps=9, checkpoint_every=4, eval_every=5))

    def fails(step: int) -> dict[str, Any]:
        if step == 7:
            raise ZeroDivisionError
        return dict(toy.train_batch(step))

    folder = RunFolder(tmp_path / "run")
    with folder.training(config), pytest.raises(ZeroDivisionError):
        train(toy._replace(train_batch=fails), config, folder, progress=False)
    with folder.training(config):
        result = train(toy, config, folder, progress=False)
    found = result["record"]
    assert (found["starts"], found["updates"]) == (2, 9)
    assert found["wall_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert 0 < found["goodput"] < 1
    assert json.loads(folder.record.read_text())["summary"] == found
    assert found["peak_memory_bytes"]["resident"] > 1e7
    lines = summary(result).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("goodput") for line in lines)


def test_the_peak_of_a_known_device_is_published_and_that_of_another_unknown() -> None:
    class Device:
        platform = "gpu"

        def __init__(self, kind: str):
            self.device_kind = kind

    assert peak_flops([Device("NVIDIA H100 80GB HBM3")] * 2).flops == 2 * 989e12
    assert peak_flops([Device("TPU v5 lite")]).flops == 197e12
    assert peak_flops([Device("TPU v5")]).flops == 459e12
    unknown = peak_flops([Device("Abacus 3000")])
    assert unknown.flops is None
    assert "Abacus 3000" in unknown.source
    measured = peak_flops(jax.devices("cpu"))
    assert measured.flops is None or measured.flops > 1e8


def test_the_table_says_what_an_update_moves() -> None:
    record = dict.fromkeys(
        ("tokens_per_second", "mfu", "flops_per_token", "goodput", "joules", "joules_per_token")
    ) | {"peak": "unknown", "wall_seconds": 1.0, "starts": 1, "peak_memory_bytes": {}, "meters_absent": {}}
    result = {"status": "finished", "step": 1, "steps": 1, "record": record}
    assert "communication" not in summary(result)
    record["received_bytes_per_update"] = {"all-gather": {"u8": 400_000}, "all-reduce": {"f32": 1_500_000}}
    line = "one update moves 1.9 MB a device: all-gather u8 0.4, all-reduce"
    assert f"communication   {line}" in summary(result).splitlines()
