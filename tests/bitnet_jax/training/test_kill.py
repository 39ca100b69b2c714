"""SIGKILL at any moment: the resumed run is bit-identical to an uninterrupted one.

Each attempt is a separate process that trains a real model with `fit` and is really killed: right after a
background save has begun, or at a random time within a random update.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.training import load_run
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.metrics import read_metrics

pytestmark = pytest.mark.extended

STEPS = 12

CHILD = """
import json, os, signal, sys
from bitnet_jax.data import TokenBatches
from bitnet_jax.training import fit
from bitnet_jax.training.checkpoints import Checkpoints

config, workdir, die_in_save = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
save, batch = Checkpoints.save, TokenBatches.batch

def save_and_die(self, step, *rest):
    save(self, step, *rest)
    if str(step) == die_in_save:
        os.kill(os.getpid(), signal.SIGKILL)

def say_and_batch(self, step):
    print(step, flush=True)
    return batch(self, step)

Checkpoints.save, TokenBatches.batch = save_and_die, say_and_batch
fit(config, workdir, progress=False)
"""


@pytest.fixture
def start(
    tmp_path: Path, repository: Path, run_config: Callable[..., RunConfig]
) -> Callable[..., subprocess.Popen[str]]:
    """Starts a process that trains in a folder; it dies during the save of step `die_in_save`."""
    (tmp_path / "text.txt").write_text("A tiny text about quantized numbers. " * 20)
    config = run_config(
        data=dict(source=str(tmp_path / "text.txt"), split="tail", valid_fraction=0.2),
        model=dict(dropout=0.1),
        training=dict(steps=STEPS, checkpoint_every=3, eval_every=6, accumulate=2),
        evaluation=dict(batches=1, batch_size=2),
    )

    def popen(
        workdir: str, die_in_save: int | None = None, cache: bool = True, **training: Any
    ) -> subprocess.Popen[str]:
        fields = config.to_dict()
        fields["training"] |= training
        environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}"}
        if cache:  # compiled once, which saves seconds per attempt
            environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        arguments = [json.dumps(fields), str(tmp_path / workdir), str(die_in_save)]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], env=environment, stdout=subprocess.PIPE, text=True
        )

    return popen


def finish(process: subprocess.Popen[str]) -> int:
    """Exit status; a child that hangs is killed and fails the test."""
    try:
        process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode


def kill_during(process: subprocess.Popen[str], step: int, rng: random.Random) -> bool:
    """SIGKILL shortly after the batch of update `step` was requested; False if the process finished first."""
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            break
    time.sleep(rng.uniform(0, 0.02))
    process.kill()
    return finish(process) == -signal.SIGKILL


def checksums(run: Path) -> dict[str, Any]:
    """The saved checksums of every array of the final checkpoint: parameters and optimizer state."""
    meta = json.loads((run / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    return {"checksums": meta["checksums"], "last": meta["last"], "position": meta["data_position"]}


def rows(run: Path) -> list[dict[str, Any]]:
    found = list(read_metrics(run / "metrics.jsonl"))
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in found]


def test_killed_and_resumed_runs_are_bit_identical_to_an_uninterrupted_one(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    rng = random.Random(0)
    run, whole = tmp_path / "run", tmp_path / "whole"

    assert finish(start("run", die_in_save=3)) == -signal.SIGKILL
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left != ["3"], "the first save finished before the process died: nothing was tested"
    assert not (run / "result.json").exists()

    kills = 1
    kills += kill_during(start("run"), rng.randrange(1, 8), rng)
    kills += finish(start("run", die_in_save=9)) == -signal.SIGKILL
    kills += kill_during(start("run"), STEPS - 1, rng)
    assert kills >= 3, "too few attempts were killed"

    assert finish(start("run")) == 0
    assert finish(start("whole", cache=False)) == 0
    assert checksums(run) == checksums(whole)  # of parameters and optimizer state
    ours, theirs = (jax.tree.leaves(load_run(folder)[2]) for folder in (run, whole))
    assert [np.asarray(leaf).tobytes() for leaf in ours] == [np.asarray(leaf).tobytes() for leaf in theirs]
    assert rows(run) == rows(whole)
    assert [row["step"] for row in rows(run) if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["12", "9"]
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    records = [(result.pop("record"), result.pop("seconds"))[0] for result in results]
    assert results[0] == results[1]
    assert [record["updates"] for record in records] == [STEPS, STEPS]
    assert records[0]["starts"] == kills + 1
    assert (records[1]["starts"], records[1]["seconds"]["lost"]) == (1, 0)


@pytest.mark.slow
def test_a_run_killed_around_its_returns_from_spikes_is_bit_identical(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    returns = dict(spike_factor=0.5, spike_window=3, max_returns=20)  # the noise of the loss is enough
    run, whole, rng = tmp_path / "run", tmp_path / "whole", random.Random(0)
    assert kill_during(start("run", **returns), 10, rng)
    assert finish(start("run", die_in_save=9, **returns)) == -signal.SIGKILL
    assert kill_during(start("run", **returns), 11, rng)
    assert finish(start("run", **returns)) == finish(start("whole", **returns)) == 0
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    assert results[0]["returns"] == results[1]["returns"] != []
    assert results[0]["record"]["starts"] == 4
    assert checksums(run) == checksums(whole)
    assert rows(run) == rows(whole)
