"""Loss spikes: the rule, the return to a checkpoint without the batches since, and that a resumed run does the same."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.training import RunConfig
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.loop import train
from bitnet_jax.training.metrics import read_metrics
from bitnet_jax.training.optimizers import make_optimizer
from bitnet_jax.training.run_folder import RunFolder
from bitnet_jax.training.spikes import Spikes, batch_position
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.task import Task

Config = Callable[..., RunConfig]
STEPS = 12


def run(task: Task, config: RunConfig, path: Path) -> dict[str, Any]:
    folder = RunFolder(path)
    with folder.training(config) as result:
        return train(task, config, folder, progress=False) if result is None else result


def final_bits(task: Task, config: RunConfig, path: Path) -> list[bytes]:
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    shapes = jax.eval_shape(lambda: TrainState.create(task.init(jax.random.key(0)), optimizer))
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(shapes.variables, shapes.opt_state)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((restored.variables, restored.opt_state))]


def rows(path: Path) -> list[dict[str, Any]]:
    found = list(read_metrics(path / "metrics.jsonl"))
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in found]


def with_bumps(toy: Task, bumps: Mapping[int, float]) -> Task:
    """The loss on the batches at some positions is higher."""

    def batch(position: int) -> dict[str, Any]:
        bump = np.full(4, bumps.get(position, 0.0), np.float32)
        return {**toy.train_batch(position), "bump": bump}

    def loss(variables: Any, batch: Any, key: Any, progress: Any) -> Any:
        sums, state = toy.loss(variables, batch, key, progress)
        return sums._replace(loss=sums.loss + sums.weight * jnp.mean(jnp.asarray(batch["bump"]))), state

    return toy._replace(train_batch=batch, loss=loss)


def settings(run_config: Config, **training: Any) -> RunConfig:
    fields = dict(
        steps=STEPS, checkpoint_every=4, eval_every=6, max_returns=3, spike_factor=20.0, spike_window=5
    )
    return run_config(training=fields | training)


def test_a_spike_is_far_above_the_median_of_the_last_losses(run_config: Config) -> None:
    spikes = Spikes(settings(run_config, spike_factor=2.0).training)
    for loss in (9.0, 1.0, 2.0, 3.0, 5.0):
        assert spikes.limit() is None, "too few losses so far"
        spikes.add(loss)
    assert spikes.limit() == pytest.approx(3 + 2 * 1.4826 * 2)
    spikes.add(4.0)  # the first one leaves
    assert spikes.limit() == pytest.approx(3 + 2 * 1.4826 * 1)
    assert Spikes(settings(run_config, spike_factor=2.0).training, spikes.state()).limit() == spikes.limit()
    spread = 1 / statistics.NormalDist().inv_cdf(0.75)
    assert spread == pytest.approx(1.4826, abs=5e-5)


def test_positions_leave_out_what_was_skipped() -> None:
    assert [batch_position(step, [(0, 1), (3, 5), (8, 8)]) for step in range(5)] == [2, 6, 7, 9, 10]
    assert [batch_position(step, []) for step in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("bump", [float("nan"), 50.0])
def test_the_run_goes_on_as_if_the_skipped_batches_did_not_exist(
    toy: Task, tmp_path: Path, run_config: Config, bump: float, capsys: Any
) -> None:
    config = settings(run_config)
    result = run(with_bumps(toy, {6: bump, 9: bump}), config, tmp_path / "run")
    assert result["status"] == "finished"
    found = [(item["from"], item["to"], item["skipped"]) for item in result["returns"]]
    assert found == [(7, 4, [4, 6]), (7, 4, [7, 9])]
    assert "back to step 4 without batches 4 to 6 (return 1 of 3)" in capsys.readouterr().err
    assert result["record"]["updates"] == STEPS
    assert result["record"]["seconds"]["lost"] > 0

    clean = with_bumps(toy, {})
    skipped = clean._replace(train_batch=lambda step: clean.train_batch(batch_position(step, [(4, 9)])))
    assert run(skipped, config, tmp_path / "clean")["returns"] == []
    assert final_bits(clean, config, tmp_path / "run") == final_bits(clean, config, tmp_path / "clean")
    assert rows(tmp_path / "run") == rows(tmp_path / "clean")


@pytest.mark.extended
@pytest.mark.parametrize("fails_at", [5, 8, 11, 14])  # before the spike, after it, after the next checkpoint
def test_a_run_that_dies_and_resumes_is_bit_identical(
    toy: Task, tmp_path: Path, run_config: Config, fails_at: int
) -> None:
    config, bumpy = settings(run_config), with_bumps(toy, {6: 50.0, 13: float("nan")})
    whole = run(bumpy, config, tmp_path / "whole")

    def fails(position: int) -> dict[str, Any]:
        if position == fails_at:
            raise ZeroDivisionError
        return dict(bumpy.train_batch(position))

    with pytest.raises(ZeroDivisionError):
        run(bumpy._replace(train_batch=fails), config, tmp_path / "run")
    result = run(bumpy, config, tmp_path / "run")
    assert result["returns"] == whole["returns"]
    assert len(result["returns"]) == 2
    assert final_bits(bumpy, config, tmp_path / "run") == final_bits(bumpy, config, tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_spike_before_the_first_checkpoint_returns_to_the_start(
    toy: Task, tmp_path: Path, run_config: Config
) -> None:
    config, bumpy = settings(run_config), with_bumps(toy, {1: float("nan")})
    result = run(bumpy, config, tmp_path / "run")
    assert [(item["from"], item["to"], item["skipped"]) for item in result["returns"]] == [(2, 0, [0, 1])]
    assert result["status"] == "finished"


def test_after_the_last_return_the_run_has_diverged(toy: Task, tmp_path: Path, run_config: Config) -> None:
    config = settings(run_config, max_returns=2)
    bumpy = with_bumps(toy, dict.fromkeys(range(6, 100), float("nan")))
    result = run(bumpy, config, tmp_path / "run")
    assert (result["status"], result["step"], len(result["returns"])) == ("diverged", 5, 2)
    off = settings(run_config, max_returns=0)
    stopped = run(with_bumps(toy, {6: 50.0}), off, tmp_path / "off")
    assert (stopped["status"], stopped["step"]) == ("diverged", 7)
    assert "returns" not in stopped
