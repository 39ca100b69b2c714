"""Runs of the study: measured or learned scales of binary weights, with and without a following batch norm."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves
from bitnet_experiments.study import product

QUESTION = "Is a learned scale of binary weights better than mean|W|?"
SOURCE = "BiT 2205.13016, ParetoQ 2502.02631, LSQ 1902.08153"
PAPER_EFFECT = "learned >= analytic; little effect where a norm follows"
SOURCE_TASK, TASK = "text classification", "image classification"
REDO = "all rows are of uncommitted code"
CLAIMS = (
    Claim(
        says="a learned scale is at least as good as mean|W|",
        contrast=("no norm, learned", "no norm, analytic"),
        less_than=0.1,
    ),
    Claim(
        says="little effect where a norm follows",
        contrast=("batch norm, learned", "batch norm, analytic"),
        equivalent=0.1,
    ),
)

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
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
