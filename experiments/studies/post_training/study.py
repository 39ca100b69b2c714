"""Runs of the study: a float model rounded after training, compared with models trained at that precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.runs import measure, model_of
from bitnet_experiments.sections import Point, arms_table, pairs_table, points

QUESTION = "Below how many bits does post-training rounding fail where quantization-aware training does not?"
SOURCE = "BitNet 2310.11453, table 3"
PAPER_EFFECT = "W8A8 nearly free, W4A4 and W2 useless, W1A8 beyond 1e23 perplexity; trained W1A8 within 12 %"
SOURCE_TASK, TASK = "language modelling", "language modelling"
CLAIMS = (
    Claim(
        says="training at one bit is better than rounding to it",
        contrast=("W1A8 trained", "W1A8"),
        less_than=0,
    ),
    Claim(says="W8A8: 0.34 nats", contrast=("W8A8", "float"), between=(0.344, 0.344)),
    Claim(says="W4A4 is useless: 8.1 nats", contrast=("W4A4", "float"), between=(8.06, 8.06)),
    Claim(says="W1A8 rounded: 51 nats", contrast=("W1A8", "float"), between=(51.5, 51.5)),
    Claim(
        says="W1A8 trained: 12 % of perplexity, 0.117 nats",
        contrast=("W1A8 trained", "float"),
        between=(0.117, 0.117),
    ),
)

METRIC = "valid_loss"
BASELINE = "float"
SEEDS = (0, 1, 2)


def _rounded(weight: str, activation: str = "int8", **more: Any) -> dict[str, Any]:
    return {"rounded": {"weight": weight, "activation": activation, "granularity": "channel", **more}}


# How the float model of the precision ladder is rounded, or which of the ladder's trained models is used.
ARMS: dict[str, dict[str, Any]] = {
    "float": {"trained": "float32"},
    "W8A8": _rounded("int8"),
    "W4A8": _rounded("int4"),
    "W4A4": _rounded("int4", "int8", activation_options={"peak": 7}),
    "W3A8": _rounded("int3"),
    "W2A8": _rounded("int2"),
    "W1.58A8": _rounded("ternary_absmean"),
    "W1A8": _rounded("binary_centred"),
    "W4A8 trained": {"trained": "int4 channel"},
    "W3A8 trained": {"trained": "int3 channel"},
    "W2A8 trained": {"trained": "int2 channel"},
    "W1.58A8 trained": {"trained": "ternary channel"},
    "W1A8 trained": {"trained": "binary channel"},
}
_BITS = {"W8": 8, "W4": 4, "W3": 3, "W2": 2, "W1.58": 1.585, "W1": 1}


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    what = ARMS[arm]
    row, config, params = model_of("precision_ladder", what.get("trained", "float32"), seed, workdir, small)
    if "trained" in what:
        return row
    return {"parameters": row["parameters"]} | measure(config, params, precision=what["rounded"])


def TRAINED_MODEL(arm: str) -> str:
    return ARMS[arm].get("trained", "float32")


def _place(arm: str, row: Mapping[str, Any]) -> Point | None:
    name, _, trained = arm.partition("A8")
    if name not in _BITS:
        return None
    return Point(_BITS[name], "trained in this precision" if trained else "rounded after training")


REPORT = (
    arms_table("valid_perplexity"),
    pairs_table(*((f"{bits} trained", bits) for bits in ("W4A8", "W3A8", "W2A8", "W1.58A8", "W1A8"))),
    points("bits", _place, xlabel="bits per weight (activations int8)", xscale="log"),
)
