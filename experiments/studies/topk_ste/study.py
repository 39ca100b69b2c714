"""Runs of the study: half of the inputs of every layer zeroed, with and without a gradient through them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from bitnet_experiments.claims import Claim
from bitnet_experiments.contrasts import Contrasts
from bitnet_experiments.intervals import Estimate
from bitnet_experiments.runs import train
from bitnet_experiments.sections import arms_table, curves, measures_table, pairs_table
from bitnet_experiments.study import Row, Study, load_study
from bitnet_jax.training.load import load_run
from bitnet_jax.training.task import language_task

QUESTION = "Must gradients pass through the inputs that top-k zeroes?"
SOURCE = "Q-Sparse 2407.10969, figures 2 and 8"
PAPER_EFFECT = "masked: gradients vanish in the bottom layers, worse loss (curves)"
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "top 50 %"
SEEDS = (0, 1, 2, 3, 4)
COMMON = {"model.num_layers": 4}  # deep enough for gradients to vanish
SMALL = {"training.steps": 60, "data.batch_size": 4}


def _arm(top_k: float, top_k_ste: str = "identity") -> dict[str, Any]:
    precision = {"weight": "ternary_absmean", "activation": "int8", "top_k": top_k, "top_k_ste": top_k_ste}
    return {"model.precision": precision}


ARMS = {
    "dense": _arm(1.0),
    "top 50 %": _arm(0.5),
    "top 50 %, masked": _arm(0.5, "masked"),
    "top 25 %": _arm(0.25),
    "top 25 %, masked": _arm(0.25, "masked"),
}


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    """Trains; adds the ratio of gradient norms of the first and the last block on one batch at the end."""
    folder = workdir / f"{arm}-seed{seed}"
    row = train(load_study("topk_ste").settings(arm, seed, small), folder)
    if row["status"] != "finished":
        return row
    config, _, params, _ = load_run(folder)
    task = language_task(config)

    def loss(params: Any) -> jax.Array:
        sums, _ = task.loss({"params": params}, task.train_batch(0), None, 1.0)
        return sums.loss

    gradient = jax.jit(jax.grad(loss))(params)
    first, last = (
        float(optax.tree.norm(gradient[f"layers_{i}"])) for i in (0, config.model["num_layers"] - 1)
    )
    return row | {"first_over_last_gradient": first / last}


def _ratio_masked(study: Study, rows: Sequence[Row]) -> Estimate | None:
    return Contrasts(study, rows, "first_over_last_gradient").arm("top 50 %, masked")


CLAIMS = (
    Claim(says="a masked gradient trains worse", contrast=("top 50 %, masked", "top 50 %"), greater_than=0),
    Claim(
        says="it is smaller in the first block relative to the last than with the estimator",
        contrast=("top 50 %, masked", "top 50 %"),
        metric="first_over_last_gradient",
        less_than=0,
    ),
    Claim(says="it vanishes towards the first block: ratio below 1", measure=_ratio_masked, less_than=1),
)

REPORT = (
    arms_table("train_grad_norm"),
    measures_table("first_over_last_gradient"),
    pairs_table(("top 50 %, masked", "top 50 %"), ("top 25 %, masked", "top 25 %"), ("top 50 %", "dense")),
    curves(),
)
