"""Runs of the study: trained models whose keys and values are rounded to decreasing bit widths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.runs import measure, model_of
from bitnet_experiments.sections import Point, arms_table, points
from bitnet_experiments.study import product

QUESTION = "To how many bits can keys and values be rounded after training?"
SOURCE = "Training Tips (2024), table 3; BitNet a4.8 2411.04965; BitNet v2 2504.18415"
PAPER_EFFECT = (
    "four bits: at most 0.2 points of accuracy; three: 0.4 to 0.8 with the first token at higher precision"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"
CLAIMS = (
    Claim(
        says="four bits cost almost nothing: at most 0.5 % of perplexity",
        contrast=("ternary kv4", "ternary"),
        less_than=0.005,
    ),
    Claim(says="three bits cost something", contrast=("ternary kv3", "ternary"), greater_than=0),
)

METRIC = "valid_loss"
BASELINE = "ternary"
SEEDS = (0, 1, 2)

ARMS = product(
    {"ternary": {"trained": "ternary tensor"}, "float": {"trained": "float32"}},
    {"": {"bits": None}} | {f" kv{bits}": {"bits": bits} for bits in (8, 4, 3, 2)},
    join="",
)


def TRAINED_MODEL(arm: str) -> str:
    return ARMS[arm]["trained"]


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    row, config, params = model_of("precision_ladder", ARMS[arm]["trained"], seed, workdir, small)
    return {"parameters": row["parameters"]} | measure(config, params, kv_bits=ARMS[arm]["bits"])


def _place(arm: str, row: Mapping[str, Any]) -> Point | None:
    name, _, bits = arm.partition(" kv")
    return Point(float(bits), name) if bits else None


REPORT = (
    arms_table("valid_perplexity", against=lambda arm: arm.split()[0]),
    points("bits", _place, xlabel="bits of keys and values"),
)
