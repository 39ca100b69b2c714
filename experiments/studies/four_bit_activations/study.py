"""Runs of the study: ternary weights with eight-bit and four-bit activations, in the layouts of three papers."""

from __future__ import annotations

from typing import Any

from bitnet_experiments.sections import arms_table, curves, pairs_table

QUESTION = "What do four-bit activations cost ternary models, and which remedies work?"
SOURCE = "BitNet a4.8 2411.04965, BitNet v2 2504.18415"
PAPER_EFFECT = (
    "four bits everywhere diverge; hybrid +0 to 1.4 % perplexity; Hadamard +1.4 to 3 %; absmean >= absmax"
)
VERDICT = "partly"

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "A8"
EFFECT = "A4 absmean"
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
