"""Runs of the study: float32 and ternary weights, computed in float32 and in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.contrasts import Contrasts
from bitnet_experiments.intervals import Estimate
from bitnet_experiments.sections import arms_table, curves, pairs_table
from bitnet_experiments.study import Study, product

QUESTION = "Do bfloat16 products and activations cost ternary training anything?"
SOURCE = "mixed precision as in BitNet b1.58 2402.17764 and SwitchBack 2304.13013"
PAPER_EFFECT = "none: few-bit models are trained in bfloat16, and no source states a cost"
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"
SEEDS = tuple(range(10))
ARMS = product(
    {
        "float32 weights": {"model.precision": "float32"},
        "ternary weights": {"model.precision": "bitnet_b158"},
    },
    {"in float32": {"model.dtype": "float32"}, "in bfloat16": {"model.dtype": "bfloat16"}},
    join=" ",
)
BASELINE = "ternary weights in float32"
_MARGIN = 0.02  # nats, a sixth of what ternary weights cost at this size; set before the first run
_COST = {"in bfloat16": 1.0, "in float32": -1.0}


def _further_cost(study: Study, rows: Sequence[Mapping[str, Any]]) -> Estimate | None:
    """What bfloat16 costs with ternary weights minus what it costs with float32 weights."""
    weights = {f"ternary weights {dtype}": cost for dtype, cost in _COST.items()}
    weights |= {f"float32 weights {dtype}": -cost for dtype, cost in _COST.items()}
    return Contrasts(study, rows).combination(weights)


CLAIMS = (
    Claim(
        says="ternary weights: no difference",
        contrast=("ternary weights in bfloat16", "ternary weights in float32"),
        equivalent=_MARGIN,
    ),
    Claim(
        says="float32 weights: no difference",
        contrast=("float32 weights in bfloat16", "float32 weights in float32"),
        equivalent=_MARGIN,
    ),
    Claim(says="and none between the two differences", measure=_further_cost, equivalent=_MARGIN),
)
REPORT = (
    arms_table(),
    pairs_table(
        ("ternary weights in bfloat16", "ternary weights in float32"),
        ("float32 weights in bfloat16", "float32 weights in float32"),
    ),
    curves(),
)
