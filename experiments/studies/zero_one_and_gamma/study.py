"""Runs of the study: weights in {0, 1}, and ternary weights with smaller and larger scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.contrasts import diverged_share
from bitnet_experiments.intervals import Range
from bitnet_experiments.sections import Point, arms_table, curves, points
from bitnet_experiments.study import Row, Study

QUESTION = "Can weights be {0, 1}, and is the mean the right scale for ternary weights?"
SOURCE = "BitNet Training Tips, Code and FAQ (2024)"
PAPER_EFFECT = "{0, 1}: exploding gradients, early divergence; larger scales: more zeros, worse (no figures)"
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "ternary x1"
SEEDS = (0, 1, 2)

_FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0)
ARMS = {
    f"ternary x{factor:g}": {
        "model.precision": {
            "weight": "ternary_absmean",
            "activation": "int8",
            "weight_options": {"factor": factor},
        }
    }
    for factor in _FACTORS
} | {
    "binary": {"model.precision": {"weight": "binary", "activation": "int8"}},
    "zero-one": {"model.precision": {"weight": "zero_one", "activation": "int8"}},
}


def _place(arm: str, row: Mapping[str, Any]) -> Point | None:
    return Point(float(arm.split("x")[1])) if arm.startswith("ternary") else None


def _diverged(study: Study, rows: Sequence[Row]) -> Range | None:
    return diverged_share(rows, ("zero-one",))


CLAIMS = (
    Claim(says="{0, 1} weights diverge: share of runs", measure=_diverged, greater_than=0.5),
    Claim(says="±1 works and is worse than ternary", contrast=("binary", "ternary x1"), greater_than=0),
    Claim(
        says="a larger scale gives more zeros",
        contrast=("ternary x2", "ternary x1"),
        metric="train_zero_fraction",
        greater_than=0,
    ),
    Claim(says="and a higher loss", contrast=("ternary x2", "ternary x1"), greater_than=0),
)

REPORT = (
    arms_table("train_zero_fraction", "train_grad_norm"),
    points("factor", _place, xlabel="scale of ternary weights, in units of mean |W|"),
    curves(arms=("ternary x1", "binary", "zero-one")),
)
