"""Runs of the study: five learning rates for each of three precisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.contrasts import Contrasts, diverged_share, values, welch
from bitnet_experiments.intervals import Estimate
from bitnet_experiments.sections import Point, arms_table, points
from bitnet_experiments.study import Study, product

QUESTION = "Do low-bit models need a larger learning rate?"
SOURCE = "BitNet 2310.11453, figure 5; Training Tips (2024); Spectra 2407.12327"
PAPER_EFFECT = "published recipes: six times the float model's (2.4e-3 against 4e-4); babyBitNet at 0.2 M: no"
SOURCE_TASK, TASK = "language modelling", "language modelling"
REDO = "12 of 45 rows are of uncommitted code"

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


def _tolerance(study: Study, rows: Sequence[Mapping[str, Any]], name: str) -> Estimate | None:
    """What the largest rate costs over the float model's best, minus what it costs the float model."""
    cost = {f"{name} 0.032": 1.0, f"{name} 0.004": -1.0, "float32 0.032": -1.0, "float32 0.004": 1.0}
    return Contrasts(study, rows).combination(cost)


def _ratio(study: Study, rows: Sequence[Mapping[str, Any]], name: str) -> Estimate | None:
    """log2 of the best rate over the float model's, each seed's by its lowest loss; Welch's interval."""
    best: dict[str, dict[int, float]] = {}
    for precision in (name, "float32"):
        losses = {rate: values(rows, f"{precision} {rate}", METRIC) for rate in _RATES}
        seeds = set.intersection(*(set(found) for found in losses.values()))
        best[precision] = {
            seed: math.log2(min(_RATES, key=lambda rate: losses[rate][seed])) for seed in seeds
        }
    if not all(best.values()):
        return None
    return welch({name: 1.0, "float32": -1.0}, best)


CLAIMS = (
    Claim(
        says="ternary tolerates a large rate better: cost of 0.032 over 0.004, minus float32's",
        measure=lambda study, rows: _tolerance(study, rows, "ternary"),
        less_than=0,
    ),
    Claim(
        says="binary tolerates a large rate better: cost of 0.032 over 0.004, minus float32's",
        measure=lambda study, rows: _tolerance(study, rows, "binary"),
        less_than=0,
    ),
    Claim(
        says="float32 diverges at a rate at which few-bit models train: share of runs at 0.032",
        measure=lambda study, rows: diverged_share(rows, ("float32 0.032",)),
        greater_than=0.5,
    ),
    Claim(
        says="the best rate of ternary models is 6 times float32's: log2 of the ratio",
        measure=lambda study, rows: _ratio(study, rows, "ternary"),
        between=(2.58, 2.58),
    ),
)

REPORT = (
    arms_table(against=lambda arm: f"{arm.split()[0]} 0.004"),
    points("rates", _place, xlabel="peak learning rate", xscale="log"),
)
