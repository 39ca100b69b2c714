"""Runs of the study: float models fine-tuned at decreasing bit widths, and the distance their weights move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from bitnet_experiments.claims import Claim
from bitnet_experiments.contrasts import Contrasts, values
from bitnet_experiments.intervals import Estimate, Range, interval
from bitnet_experiments.runs import model_of, train_from
from bitnet_experiments.sections import Point, arms_table, points
from bitnet_experiments.study import Study, load_study
from bitnet_jax.training.load import load_run

QUESTION = "Are weights compensated at three or more bits, and reconstructed at two or fewer?"
SOURCE = "ParetoQ 2502.02631"
PAPER_EFFECT = (
    "weights move 10 to 20 % from the float ones at 3 and 4 bits, about 40 % at 2 or fewer (digests)"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "float32"
SEEDS = (0, 1, 2)

# ParetoQ's recipe: no weight decay, cosine without warm-up. One learning rate for all; the paper's is 2e-5 or 1e-5.
COMMON = {
    "training.steps": 300,
    "training.checkpoint_every": 300,
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup_steps": 0,
}
_LSQ2: dict[str, Any] = {
    "weight": "int2",
    "weight_ste": "clipped",
    "scale": "learned",
    "granularity": "channel",
}
_LSQ2 |= {"weight_options": {"levels": "zero", "statistic": "absmax", "count": "matrix"}}
_PRECISIONS: dict[str, Any] = {
    "float32": "float32",
    "W4": "paretoq_4",
    "W3": "paretoq_3",
    "W2 SEQ": "paretoq_2",
    "W2 LSQ": _LSQ2,
    "W1.58 SEQ": "paretoq_1.58",
    "W1": "paretoq_1",
}
ARMS = {name: {"model.precision": precision} for name, precision in _PRECISIONS.items()}
SMALL = {"training.steps": 60}
_BITS = {"W4": 4, "W3": 3, "W2": 2, "W1.58": 1.585, "W1": 1}


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    """Trains from the ladder's float model; adds ||W - W0|| / ||W0|| over the latent weights of the blocks."""
    _, _, before = model_of("precision_ladder", "float32", seed, workdir, small)
    config = load_study("bit_transition").settings(arm, seed, small)
    row = train_from(before, config, workdir / f"{arm}-seed{seed}")
    _, model, after, _ = load_run(workdir / f"{arm}-seed{seed}")
    moved, size = 0.0, 0.0
    for path in model.linear_shapes():
        old, new = before, after
        for name in path.split("/"):
            old, new = old[name], new[name]
        moved += float(jnp.sum(jnp.square(new["weight"] - old["weight"])))
        size += float(jnp.sum(jnp.square(old["weight"])))
    return row | {"weight_change": (moved / size) ** 0.5}


def _place(arm: str, row: Mapping[str, Any]) -> Point | None:
    name, _, method = arm.partition(" ")
    return Point(_BITS[name], method or "LSQ", arm) if name in _BITS else None


def EFFECT(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    found = {arm: list(values(rows, arm, "weight_change").values()) for arm in ("W3", "W2 SEQ")}
    texts = [f"{arm}: {interval([100 * v for v in changes])} %" for arm, changes in found.items() if changes]
    return f"weights move, {', '.join(texts)}" if texts else ""


def _step(study: Study, rows: Sequence[Mapping[str, Any]]) -> Estimate | Range | None:
    """The change of weights from 3 to 2 bits minus that from 2 to 1.58."""
    return Contrasts(study, rows, "weight_change").combination({"W2 SEQ": 2.0, "W3": -1.0, "W1.58 SEQ": -1.0})


CLAIMS = (
    Claim(
        says="weights move further at 2 bits than at 3",
        contrast=("W2 SEQ", "W3"),
        metric="weight_change",
        greater_than=0,
    ),
    Claim(
        says="there is a step between 3 and 2 bits: more than from 2 to 1.58", measure=_step, greater_than=0
    ),
    Claim(says="SEQ beats LSQ at 2 bits", contrast=("W2 SEQ", "W2 LSQ"), less_than=0),
)

REPORT = (
    arms_table("weight_change"),
    points("change", _place, metric="weight_change", xlabel="bits per weight", ylabel="||W - W0|| / ||W0||"),
)
