"""Several processes on this machine that train one run: the same bits, and what happens when one of them stops.

Every process is the command of a user, `bitnet-jax train`, and is really signalled or killed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.training import RunConfig, fit
from bitnet_jax.training.metrics import read_metrics

pytestmark = pytest.mark.extended

STEPS = 24
EARLY, LATE = 9, 14  # after a checkpoint, and between two
SETTINGS: dict[str, Any] = dict(
    model=dict(hidden_size=16, num_layers=1, num_heads=2, ffn_size=32, precision="bitnet_b158", dropout=0.1),
    data=dict(split="tail", valid_fraction=0.2, length=16, batch_size=8),
    optimizer=dict(learning_rate=0.01, schedule="cosine"),
    training=dict(steps=STEPS, checkpoint_every=4, eval_every=12),
    evaluation=dict(batches=2, batch_size=4),
)
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({settings!r})
"""
# `bitnet-jax`, which says on stdout which update it is about to do.
COMMAND = """
from bitnet_jax.cli.main import console
from bitnet_jax.data import TokenBatches

batch = TokenBatches.batch

def say_and_batch(self, step, *args, **rows):
    print(step, flush=True)
    return batch(self, step, *args, **rows)

TokenBatches.batch = say_and_batch
console()
"""


class Process:
    """A running `bitnet-jax train`; `errors` is the file of its stderr."""

    def __init__(self, arguments: list[str], environment: dict[str, str], errors: Path):
        self.errors = errors
        with errors.open("w") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "train", *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def signal_at(self, step: int, number: int) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.strip() == str(step):
                break
        self.popen.send_signal(number)

    def stop(self) -> None:
        self.popen.kill()
        self.popen.communicate()

    def ended(self) -> tuple[int, str]:
        """Exit status and stderr; a process that hangs fails the test."""
        try:
            self.popen.communicate(timeout=120)
        finally:
            self.stop()
        return self.popen.returncode, self.errors.read_text()


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("A tiny text about quantized numbers. " * 60)
    settings = {**copy.deepcopy(SETTINGS), "data": {**SETTINGS["data"], "source": str(tmp_path / "text.txt")}}
    (tmp_path / "config.py").write_text(CONFIG.format(settings=settings))
    return settings


@pytest.fixture
def start(
    tmp_path: Path, repository: Path, settings: dict[str, Any]
) -> Iterator[Callable[..., list[Process]]]:
    """Starts all processes of a run in the folder `run`, each with one device."""
    with contextlib.ExitStack() as stack:

        def processes(count: int, *options: str, of_last: tuple[str, ...] = ()) -> list[Process]:
            environment = os.environ | {
                "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            }
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            given = {"launch": "manual", "coordinator": f"127.0.0.1:{port}", "processes": count}
            started = []
            for index in range(count):
                section = given | {"process": index, "heartbeat_seconds": 60}
                arguments = ["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]
                arguments += [f"--config.distributed.{name}={value}" for name, value in section.items()]
                arguments += [*options, *(of_last if index == count - 1 else ())]
                started.append(Process(arguments, environment, tmp_path / f"errors{index}"))
                stack.callback(started[-1].stop)
            return started

        yield processes


def record(run: Path) -> dict[str, Any]:
    """The rows of a run, and the checksums of its last checkpoint: parameters and optimizer state."""
    meta = json.loads((run / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    rows = [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in read_metrics(run / "metrics.jsonl")
    ]
    return {"checksums": meta["checksums"], "rows": rows}


def reference(settings: dict[str, Any], folder: Path, **mesh: int) -> dict[str, Any]:
    """The record of one process with as many devices as the mesh has."""
    fit(RunConfig.from_dict({**settings, "mesh": mesh}), folder, progress=False)
    return record(folder)


def test_two_processes_are_bit_identical_to_one_with_two_devices_after_one_was_killed(
    settings: dict[str, Any], start: Callable[..., list[Process]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first, second = start(2, "--config.mesh.fsdp=2")
    second.signal_at(EARLY, signal.SIGKILL)
    (code, errors), (killed, _) = first.ended(), second.ended()
    assert killed == -signal.SIGKILL
    assert code == 2, errors
    assert "another process has stopped" in errors
    assert "Traceback" not in errors
    assert not (run / "result.json").exists()

    for process in start(2, "--config.mesh.fsdp=2"):
        code, errors = process.ended()
        assert code == 0, errors
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
    assert record(run) == reference(settings, tmp_path / "reference", fsdp=2)


def test_a_signal_to_one_process_stops_all_at_one_step_and_one_process_can_resume(
    settings: dict[str, Any], start: Callable[..., list[Process]], tmp_path: Path
) -> None:
    first, second = start(2, "--config.mesh.data=2")
    second.signal_at(LATE, signal.SIGTERM)
    (code, errors), (other, silent) = first.ended(), second.ended()
    assert (code, other) == (143, 143)
    assert f"SIGTERM: saved step {LATE + 2} of {STEPS}" in errors
    assert "saved step" not in silent
    fit(RunConfig.from_dict({**settings, "mesh": {"data": 2}}), tmp_path / "run", progress=False)
    assert record(tmp_path / "run") == reference(settings, tmp_path / "reference", data=2)


def test_four_processes_continue_the_run_of_one(
    settings: dict[str, Any], start: Callable[..., list[Process]], tmp_path: Path
) -> None:
    """Four devices add the parts of a sum in another order. In float32 the first update after the change differs by
    rounding alone; in few bits it could also round an activation to another code. Later ones add up."""
    settings["optimizer"]["schedule"], settings["model"]["precision"] = "constant", "float32"
    longer = reference(settings, tmp_path / "reference")
    shorter = {**settings, "training": {**settings["training"], "steps": STEPS // 2}}
    fit(RunConfig.from_dict(shorter), tmp_path / "run", progress=False)
    options = ("--config.mesh.data=2", "--config.mesh.tensor=2", "--config.optimizer.schedule=constant")
    for process in start(4, *options, "--config.model.precision=float32"):
        code, errors = process.ended()
        assert code == 0, errors
    continued = record(tmp_path / "run")
    at = {row["step"]: row["loss"] for row in continued["rows"] if row["kind"] == "train"}
    expected = {row["step"]: row["loss"] for row in longer["rows"] if row["kind"] == "train"}
    assert at.keys() == expected.keys()
    assert at[STEPS // 2 + 1] == pytest.approx(expected[STEPS // 2 + 1], rel=1e-6)
    assert at[STEPS] == pytest.approx(expected[STEPS], rel=1e-3)


def test_an_error_in_one_process_is_reported_by_all(
    start: Callable[..., list[Process]], tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.txt")
    first, second = start(2, "--config.mesh.fsdp=2", of_last=(f"--config.data.source={missing}",))
    for code, errors in (first.ended(), second.ended()):
        assert code == 2, errors
        assert "missing.txt" in errors
        assert "Traceback" not in errors
