"""Runs of several durations that share their first updates.

With the schedule wsd (warm-up, stable, decay) runs that differ in `training.steps` alone are the same until the shorter
one begins to decay. A longer run can therefore begin with the shorter one's checkpoint of that step, and is
bit-identical to one trained from scratch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_experiments.runs import locked, train
from bitnet_jax.quantization.precision import annealed
from bitnet_jax.training.checkpoints import saved_steps
from bitnet_jax.training.config import CHANGEABLE_ON_RESUME, RunConfig, differing_fields
from bitnet_jax.training.optimizers import learning_rate, weight_decay
from bitnet_jax.training.run_folder import RunFolder


def train_longer(shorter: RunConfig, begun: Path, config: RunConfig, folder: Path) -> dict[str, Any]:
    """`train` of a run that begins with what it shares with a shorter one, which is trained in `begun` if it was not.

    Args:
      shorter: differs from `config` in training.steps, and keeps the checkpoint where its decay begins.

    Raises:
      ValueError: the two runs differ before that step, or there is no such checkpoint.
    """
    step = _decay_begins(shorter)
    _check_shared(shorter, config, step)
    train(shorter, begun)
    saved = saved_steps(RunFolder(begun).checkpoints)
    if step not in saved:
        raise ValueError(
            f"{begun}: got checkpoints at {saved}, expected one at {step}, where the decay begins; set "
            "training.checkpoint_every to it"
        )
    with locked(folder.with_name(folder.name + ".lock")):
        if not RunFolder(folder).trained():
            _copy(begun, config, folder, step)
    return train(config, folder)


def _decay_begins(config: RunConfig) -> int:
    if config.optimizer.schedule != "wsd":
        raise ValueError(
            f"optimizer.schedule: got {config.optimizer.schedule!r}, expected 'wsd' to branch from"
        )
    share = 1 - config.optimizer.decay_share
    return int(config.training.steps * share + 1e-6)  # a product just below a whole number counts as it


def _check_shared(shorter: RunConfig, config: RunConfig, step: int) -> None:
    """Raises ValueError if the first `step` updates of the two differ."""
    if differing := differing_fields(shorter, config, ignored=CHANGEABLE_ON_RESUME):
        raise ValueError(
            f"got runs that differ in {'; '.join(differing)}, expected only another training.steps"
        )
    t = jnp.arange(step)
    for rate in (learning_rate, weight_decay):
        mine, other = (rate(t, one.training.steps, one.optimizer) for one in (shorter, config))
        if not np.array_equal(mine, other):
            raise ValueError(
                f"{rate.__name__}: got values that differ before step {step}, expected one that depends on the total "
                "number of updates only in the decay"
            )
    precisions = config.model_config(config.model["vocab_size"]).precisions()
    follows = annealed(precisions.values())
    if share := config.model.get("sub_norm_warmup"):
        follows.append(f"sub_norm_warmup={share}")
    if follows:
        raise ValueError(f"got {follows[0]}, which depends on the total number of updates")


def _copy(begun: Path, config: RunConfig, folder: Path, step: int) -> None:
    """The state of `begun` at `step` as a run with the settings `config`, complete or not at all."""
    beside = folder.with_name(folder.name + ".begun")
    shutil.rmtree(beside, ignore_errors=True)
    source, target = RunFolder(begun), RunFolder(beside)
    shutil.copytree(source.checkpoints / str(step), target.checkpoints / str(step))
    for file in (source.metrics, source.tokenizer):
        shutil.copy2(file, beside / file.name)
    target.write_config(config)
    shutil.copy2(begun.with_name(begun.name + ".origin.json"), folder.with_name(folder.name + ".origin.json"))
    shutil.rmtree(folder, ignore_errors=True)  # a folder that no update has finished in
    beside.rename(folder)
