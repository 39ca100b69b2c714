"""Runs of the study: ReLU outputs binarized to ±1 or to {0, 1}."""

from __future__ import annotations

from bitnet_experiments.sections import arms_table, curves

QUESTION = "Should ReLU outputs be binarized to {0, 1} rather than ±1?"
SOURCE = "BiT 2205.13016 (two-set binarization)"
PAPER_EFFECT = "{0, 1} better; ±1 on non-negative values can fail to train"
VERDICT = "reproduced"
EFFECT = "{0, a}"

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
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
