"""Runs of the study: one model at five widths and three precisions, with the same tokens for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import Point, arms_table, pairs_table, points, size_law
from bitnet_experiments.study import product, zip_
from bitnet_experiments.trends import Pairs, middle, slope, trends_table

QUESTION = "How do the penalties of ternary and binary weights change with size?"
SOURCE = "BitNet 2310.11453, BitNet b1.58 2402.17764, Spectra 2407.12327"
PAPER_EFFECT = (
    "ternary: 0.31 to 0.24 nats from 99 M to 390 M parameters, exponent 0.26; binary a further 0.19 at 99 M"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "d16 float32"
SEEDS = (0, 1, 2)

_WIDTHS = (16, 24, 32, 48, 64)
ARMS = product(
    zip_(
        [f"d{width}" for width in _WIDTHS],
        model__hidden_size=_WIDTHS,
        model__ffn_size=[3 * width for width in _WIDTHS],
    ),
    {
        "float32": {"model.precision": "float32"},
        "ternary": {"model.precision": "bitnet_b158"},
        "binary": {"model.precision": "bitnet"},
    },
    join=" ",
)


def _float_of(arm: str) -> str:
    return f"{arm.split()[0]} float32"


def _place(arm: str, row: Mapping[str, Any]) -> Point:
    return Point(row["parameters"] / 1e3, arm.split()[1])


def _bytes(arm: str, row: Mapping[str, Any]) -> Point:
    return Point(row["model_bytes"], arm.split()[1])


# Parameters of the models, counted with the embedding table.
_SIZES = {16: 7_392, 24: 15_696, 32: 27_072, 48: 59_040, 64: 103_296}


def _pairs(arm: str, other: str) -> Pairs:
    return {_SIZES[width]: (f"d{width} {arm}", f"d{width} {other}") for width in _WIDTHS}


_PENALTIES = {
    "ternary minus float32": _pairs("ternary", "float32"),
    "binary minus float32": _pairs("binary", "float32"),
    "binary minus ternary": _pairs("binary", "ternary"),
}
CLAIMS = (
    Claim(
        says="the penalty of ternary weights shrinks with size",
        measure=lambda study, rows: slope(study, rows, _PENALTIES["ternary minus float32"]),
        less_than=0,
    ),
    Claim(
        says="from 0.31 at 99 M to 0.24 at 390 M: -0.12 per decade",
        measure=lambda study, rows: slope(study, rows, _PENALTIES["ternary minus float32"]),
        between=(-0.118, -0.118),
    ),
    Claim(
        says="binary weights are worse than ternary",
        measure=lambda study, rows: middle(study, rows, _PENALTIES["binary minus ternary"]),
        greater_than=0,
    ),
    Claim(
        says="their difference shrinks from 0.19 at 99 M to 0.12 at 1.1 B: -0.067 per decade",
        measure=lambda study, rows: slope(study, rows, _PENALTIES["binary minus ternary"]),
        between=(-0.067, -0.067),
    ),
)

REPORT = (
    arms_table("model_bytes", against=_float_of),
    pairs_table(*[(f"d{width} binary", f"d{width} ternary") for width in _WIDTHS]),
    trends_table(_PENALTIES),
    size_law("size", _place, xlabel="thousand parameters"),
    points("bytes", _bytes, xlabel="bytes of the model", xscale="log"),
)
