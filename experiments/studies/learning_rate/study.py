"""Runs of the study: five learning rates for each of three precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_experiments.sections import Point, arms_table, points, values
from bitnet_experiments.study import Study, product

QUESTION = "Do low-bit models need a larger learning rate?"
SOURCE = "BitNet 2310.11453, figure 5; Training Tips (2024); Spectra 2407.12327"
PAPER_EFFECT = "published recipes: six times the float model's (2.4e-3 against 4e-4); babyBitNet at 0.2 M: no"
VERDICT = "partly"

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "float32 0.004"
SEEDS = (0, 1, 2)

COMMON = {"training.steps": 500}
SMALL = {"training.steps": 100}
_RATES = (0.002, 0.004, 0.008, 0.016, 0.032)
_PRECISIONS = {"float32": "float32", "ternary": "bitnet_b158", "binary": "bitnet"}
ARMS = product(
    {name: {"model.precision": recipe} for name, recipe in _PRECISIONS.items()},
    {str(rate): {"optimizer.learning_rate": rate} for rate in _RATES},
    join=" ",
)
SMALL_ARMS = tuple(arm for arm in ARMS if not arm.startswith("binary"))


def _place(arm: str, row: Mapping[str, Any]) -> Point:
    name, rate = arm.split()
    return Point(float(rate), name)


def EFFECT(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    """The best rate of each precision, by its mean over seeds."""
    best = []
    for name in _PRECISIONS:
        means = {
            rate: float(np.mean(list(found.values())))
            for rate in _RATES
            if (found := values(rows, f"{name} {rate}", METRIC))
        }
        if means:
            best.append(f"{name}: {min(means, key=lambda rate: means[rate]):g}")
    return f"best of five, {', '.join(best)}" if best else ""


REPORT = (
    arms_table(against=lambda arm: f"{arm.split()[0]} 0.004"),
    points("rates", _place, xlabel="peak learning rate", xscale="log"),
)
