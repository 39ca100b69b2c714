"""Runs of the study: ternary weights with eight-bit and four-bit activations, in the layouts of three papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.contrasts import diverged_share
from bitnet_experiments.intervals import Range
from bitnet_experiments.sections import arms_table, curves, pairs_table
from bitnet_experiments.study import Row, Study

QUESTION = "What do four-bit activations cost ternary models, and which remedies work?"
SOURCE = "BitNet a4.8 2411.04965, BitNet v2 2504.18415"
PAPER_EFFECT = (
    "four bits everywhere diverge; hybrid +0 to 1.4 % perplexity; Hadamard +1.4 to 3 %; absmean >= absmax"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "A8"
SEEDS = (0, 1, 2, 3, 4)


def _ternary(activation: str, **more: Any) -> dict[str, Any]:
    return {"weight": "ternary_absmean", "activation": activation, **more}


_ABSMAX = _ternary("int8", activation_options={"peak": 7})  # absmax with seven levels per side
ARMS: dict[str, dict[str, Any]] = {
    "A8": {"model.precision": "bitnet_b158"},
    "A4 absmean": {"model.precision": _ternary("int4")},
    "A4 absmax": {"model.precision": _ABSMAX},
    "hybrid absmean": {
        "model.precision": [
            ["*o_proj", "bitnet_b158"],
            ["*down_proj", "bitnet_b158"],
            ["*", _ternary("int4")],
        ]
    },
    "hybrid absmax": {
        "model.precision": [["*o_proj", "bitnet_b158"], ["*down_proj", "bitnet_b158"], ["*", _ABSMAX]]
    },
    "a4.8": {"model.precision": "bitnet_a48"},
    "A8 Hadamard": {"model.precision": "bitnet_v2"},
    "A4 Hadamard": {"model.precision": "bitnet_v2_a4"},
}


def _diverged(study: Study, rows: Sequence[Row]) -> Range | None:
    return diverged_share(rows, ("A4 absmean", "A4 absmax"))


CLAIMS = (
    Claim(
        says="eight bits before o_proj and down_proj are better than four bits everywhere",
        contrast=("hybrid absmean", "A4 absmean"),
        less_than=0,
    ),
    Claim(
        says="with them perplexity rises by 0 to 1.4 % over eight bits",
        contrast=("hybrid absmean", "A8"),
        between=(0, 0.0139),
    ),
    Claim(
        says="with Hadamard transforms four bits cost 1.4 to 3 % of perplexity",
        contrast=("A4 Hadamard", "A8"),
        between=(0.0139, 0.0296),
    ),
    Claim(
        says="absmean is at least as good as absmax",
        contrast=("hybrid absmean", "hybrid absmax"),
        less_than=0.01,
    ),
    Claim(says="four bits everywhere diverge: share of runs", measure=_diverged, greater_than=0.5),
)

REPORT = (
    arms_table(),
    pairs_table(
        ("A4 absmean", "A4 absmax"),
        ("hybrid absmean", "hybrid absmax"),
        ("hybrid absmean", "A4 absmean"),
        ("A4 Hadamard", "A4 absmean"),
        ("A4 Hadamard", "A8 Hadamard"),
    ),
    curves(),
)
