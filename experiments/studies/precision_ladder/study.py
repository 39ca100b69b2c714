"""Runs of the study: one model, with the same tokens and seeds, at every precision that has a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.frontier import Mark, frontier
from bitnet_experiments.sections import Point, arms_table, pairs_table, points
from bitnet_jax.quantization.recipes import resolve

QUESTION = "What does each bit of weights and activations cost, all else equal?"
SOURCE = "ParetoQ 2502.02631, Spectra 2407.12327"
PAPER_EFFECT = (
    "1.58 to 3 bits on the frontier of quality and bytes; loss: ternary above float, binary above ternary"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"
REDO = "arms were measured on machines of one and of two cores"
CLAIMS = (
    Claim(
        says="ternary 0.31 nats above float (99 M)",
        contrast=("ternary tensor", "float32"),
        between=(0.31, 0.31),
    ),
    Claim(
        says="binary a further 0.19 (99 M)",
        contrast=("binary tensor", "ternary tensor"),
        between=(0.19, 0.19),
    ),
    Claim(
        says="scales of groups do not change the loss visibly",
        contrast=("ternary group", "ternary tensor"),
        equivalent=0.02,
    ),
    Claim(
        says="learned activation ranges are better at one bit",
        contrast=("binary A1 learned", "binary A1"),
        less_than=0,
    ),
)

CONFIG = "study_lm"
METRIC = "valid_loss"  # nats per character over all held-out text, after the last step
BASELINE = "float32"
SEEDS = (0, 1, 2, 3, 4)

_GROUP = 16  # inputs that share a scale; divides 32 and 96


def _recipe(weight: str, activation: str = "int8", **more: Any) -> dict[str, Any]:
    return {"model.precision": {"weight": weight, "activation": activation, **more}}


ARMS = {
    "float32": {"model.precision": "float32"},
    "bfloat16": {"model.precision": "bfloat16"},
    "int8 channel": {"model.precision": "int8"},
    "int4 channel": {"model.precision": "int4"},
    "int4 A4 learned": {"model.precision": "lsq4"},
    "int3 channel": {"model.precision": "int3"},
    "int2 channel": {"model.precision": "int2"},
    "ternary tensor": {"model.precision": "bitnet_b158"},
    "ternary channel": {"model.precision": "bitnet_b158_channel"},
    "ternary group": _recipe("ternary_absmean", granularity=_GROUP),
    "ternary learned": _recipe("ternary_absmean", scale="learned"),
    "ternary W only": {"model.precision": "bitnet_weight_only"},
    "ternary median": {"model.precision": "bitnet_b158_median"},
    "ternary TWN": {"model.precision": "twn"},
    "ternary A4": _recipe("ternary_absmean", "int4"),
    "binary tensor": {"model.precision": "bitnet"},
    "binary channel": {"model.precision": "bitnet_channel"},
    "binary group": _recipe("binary_centred", granularity=_GROUP),
    "binary learned": _recipe("binary_centred", scale="learned"),
    "binary W only": {"model.precision": "binary_weight_only"},
    "binary A4": _recipe("binary_centred", "int4"),
    "binary A1": _recipe("binary_centred", "sign_absmean", activation_ste="clipped"),
    "binary A1 learned": {"model.precision": "bit"},
}


def _place(arm: str, row: Mapping[str, Any]) -> Point:
    return Point(row["weight_bits"], arm.partition(" ")[2] or "float")


def _mark(arm: str, row: Mapping[str, Any]) -> Mark:
    precision = resolve(row["overrides"]["model.precision"], ["layer"])["layer"]
    family = arm.partition(" ")[0].rstrip("0123456789")
    family = {"float": "float", "bfloat": "float", "int": "integer"}.get(family, family)
    weight, activation = f"{precision.weight_bits:.3g}", f"{precision.activation_bits:g}"
    return Mark(row["model_bytes"], family, f"A{activation}", f"W{weight} A{activation}")


REPORT = (
    arms_table("weight_bits", "model_bytes"),
    pairs_table(
        ("binary tensor", "ternary tensor"),
        ("ternary tensor", "int2 channel"),
        ("int3 channel", "int4 channel"),
        ("ternary channel", "ternary tensor"),
        ("ternary group", "ternary tensor"),
        ("ternary learned", "ternary tensor"),
        ("ternary median", "ternary tensor"),
        ("ternary TWN", "ternary tensor"),
        ("ternary W only", "ternary tensor"),
        ("ternary A4", "ternary tensor"),
        ("binary channel", "binary tensor"),
        ("binary group", "binary tensor"),
        ("binary learned", "binary tensor"),
        ("binary W only", "binary tensor"),
        ("binary A4", "binary tensor"),
        ("binary A1", "binary A4"),
        ("binary A1 learned", "binary A1"),
    ),
    points("bits", _place, xlabel="bits per weight of the blocks", xscale="log", joined=False),
    frontier("bytes", _mark, xlabel="bytes of the model"),
)
