"""Runs of the study: one model at five widths and three precisions, with the same tokens for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_experiments.intervals import interval, paired
from bitnet_experiments.sections import Point, arms_table, pairs_table, points, size_law, values
from bitnet_experiments.study import Study, product, zip_

QUESTION = "How do the penalties of ternary and binary weights change with size?"
SOURCE = "BitNet 2310.11453, BitNet b1.58 2402.17764, Spectra 2407.12327"
PAPER_EFFECT = (
    "ternary: 0.31 to 0.24 nats from 99 M to 390 M parameters, exponent 0.26; binary a further 0.19 at 99 M"
)
VERDICT = "partly"

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


def EFFECT(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    """The penalty of ternary weights at the smallest and the largest width."""
    texts = []
    for width in (_WIDTHS[0], _WIDTHS[-1]):
        ternary, base = (values(rows, f"d{width} {name}", METRIC) for name in ("ternary", "float32"))
        apart = paired(ternary, base)
        texts += [f"ternary, d = {width}: {interval(apart)}"] if apart else []
    return "; ".join(texts)


REPORT = (
    arms_table("model_bytes", against=_float_of),
    pairs_table(*[(f"d{width} binary", f"d{width} ternary") for width in _WIDTHS]),
    size_law("size", _place, xlabel="thousand parameters"),
    points("bytes", _bytes, xlabel="bytes of the model", xscale="log"),
)
