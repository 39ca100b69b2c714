"""Runs of the study: a vision transformer from float to fully binary, one component at a time."""

from __future__ import annotations

from typing import Any

from bitnet_experiments.sections import arms_table, curves, pairs_table

QUESTION = "Which parts of a vision transformer are sensitive to binarization?"
SOURCE = "BiT 2205.13016, BinaryBERT and BiBERT (GLUE, table in the README of BiT's code); no table on MNIST"
PAPER_EFFECT = "GLUE average: float 83.9, W1A4 79.9, W1A1 41.0 with fixed ranges, 71.0 with learned ones"
SOURCE_TASK, TASK = "text classification", "image classification"
CLAIMS = ()
EFFECT = "W1A1, binary attention"

CONFIG = "mnist_vit"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "float32"

COMMON = {"training.steps": 600}  # one epoch
SMALL = {"training.steps": 240}


def _arm(recipe: str, attention: str = "softmax") -> dict[str, Any]:
    return {"model.precision": recipe, "model.attention": attention}


ARMS = {
    "float32": _arm("float32"),
    "W1A8": _arm("bitnet"),
    "W1A4": _arm("bitnet(activation=int4)"),
    "W1A1 fixed": _arm("bitnet(activation=sign_absmean, activation_ste=clipped)"),
    "W1A1": _arm("bit_relu"),
    "W1A1, binary attention": _arm("bit_relu", "binary"),
}
SEEDS = (0, 1, 2)
REPORT = (
    arms_table("valid_loss", "train_loss", "weight_bits"),
    pairs_table(
        ("W1A4", "W1A8"), ("W1A1 fixed", "W1A4"), ("W1A1", "W1A1 fixed"), ("W1A1, binary attention", "W1A1")
    ),
    curves(),
)
