"""Runs of the study: measured or learned scales of binary weights, with and without a following batch norm."""

from __future__ import annotations

from bitnet_experiments.sections import arms_table, curves
from bitnet_experiments.study import product

QUESTION = "Is a learned scale of binary weights better than mean|W|?"
SOURCE = "BiT 2205.13016, ParetoQ 2502.02631, LSQ 1902.08153"
PAPER_EFFECT = "learned >= analytic; little effect where a norm follows"
VERDICT = "not at this size"
EFFECT = "no norm, learned"

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
BASELINE = "no norm, analytic"

_BINARY = {"weight": "binary", "weight_ste": "clipped", "granularity": "channel"}
ARMS = product(
    {
        "no norm": {"model.norm": "none", "model.activation": "relu"},
        "batch norm": {"model.norm": "batch", "model.activation": "relu"},
    },
    {
        "analytic": {"model.precision": {**_BINARY, "scale": "analytic"}},
        "learned": {"model.precision": {**_BINARY, "scale": "learned"}},
    },
    join=", ",
)
SEEDS = (0, 1, 2)
REPORT = (arms_table("valid_loss", "train_loss"), curves())
