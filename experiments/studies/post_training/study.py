"""Runs of the study: a float model rounded after training, compared with models trained at that precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_experiments.intervals import interval
from bitnet_experiments.runs import measure, model_of
from bitnet_experiments.sections import Point, arms_table, difference, points
from bitnet_experiments.study import Study

QUESTION = "Below how many bits does post-training rounding fail where quantization-aware training does not?"
SOURCE = "BitNet 2310.11453, table 3"
PAPER_EFFECT = "W8A8 nearly free, W4A4 and W2 useless, W1A8 beyond 1e23 perplexity; trained W1A8 within 12 %"
VERDICT = "partly"

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


def _place(arm: str, row: Mapping[str, Any]) -> Point | None:
    name, _, trained = arm.partition("A8")
    if name not in _BITS:
        return None
    return Point(_BITS[name], "trained in this precision" if trained else "rounded after training")


def EFFECT(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    arms = ("W8A8", "W1A8", "W1A8 trained")
    apart = {arm: difference(study, rows, arm) for arm in arms}
    return "; ".join(f"{arm}: {interval(values)}" for arm, values in apart.items() if values)


REPORT = (
    arms_table("valid_perplexity"),
    points("bits", _place, xlabel="bits per weight (activations int8)", xscale="log"),
)
