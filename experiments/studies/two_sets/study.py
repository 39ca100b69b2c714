"""Runs of the study: ReLU outputs binarized to ±1 or to {0, 1}."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves

QUESTION = "Should ReLU outputs be binarized to {0, 1} rather than ±1?"
SOURCE = "BiT 2205.13016 (two-set binarization)"
PAPER_EFFECT = "{0, 1} better; ±1 on non-negative values can fail to train"
SOURCE_TASK, TASK = "text classification", "image classification"
CLAIMS = (
    Claim(says="{0, a} is better than ±a", contrast=("{0, a}", "±a"), less_than=0),
    Claim(
        says="±1 on non-negative values can fail to train, {0, 1} does not",
        contrast=("±1 fixed", "{0, 1} fixed"),
        greater_than=0,
    ),
)

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "±a"

_FIXED = "activation_scale=analytic, activation_shift=False"
ARMS = {
    name: {"model.activation": "relu", "model.precision": recipe}
    for name, recipe in {
        "±a": "bit",  # sign(x - b) with a learned scale and thresholds b, initialized with 0
        "{0, a}": "bit(activation=elastic_unsigned)",
        "±1 fixed": f"bit(activation=sign, {_FIXED})",
        "{0, 1} fixed": f"bit(activation=boolean, {_FIXED})",
    }.items()
}
SEEDS = (0, 1, 2)
REPORT = (arms_table("valid_loss", "train_loss"), curves())
