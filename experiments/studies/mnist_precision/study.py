"""Runs of the study: a small network with every layer at one of six precisions."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves

QUESTION = "What does each weight precision cost a small network on MNIST?"
SOURCE = "BitNetMCU, raw run files (w = 64, 30 epochs)"
PAPER_EFFECT = "binary +1.2 points of error, ternary +0.6, 2 bits +0.3, 4 bits +0.2, 8 bits +0.1"
SOURCE_TASK, TASK = "image classification", "image classification"
REDO = "14 of 30 rows are of uncommitted code"
CLAIMS = (
    Claim(says="binary +1.21 points, ± 0.2", contrast=("binary", "float32"), between=(1.01, 1.41)),
    Claim(says="ternary +0.61 points, ± 0.2", contrast=("ternary", "float32"), between=(0.41, 0.81)),
    Claim(says="2 bits +0.28 points, ± 0.2", contrast=("2 bits", "float32"), between=(0.08, 0.48)),
    Claim(says="4 bits +0.16 points, ± 0.2", contrast=("4 bits", "float32"), between=(-0.04, 0.36)),
    Claim(says="8 bits +0.10 points, ± 0.2", contrast=("8 bits", "float32"), between=(-0.1, 0.3)),
)

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "float32"

_NETWORK = {
    "model.hidden_size": 64,
    "model.norm": "rmsnorm",  # before each layer, without gain
    "model.activation": "relu",
    "optimizer.learning_rate": 1e-3,
}
ARMS = {
    name: {**_NETWORK, "model.precision": recipe, "model.first": recipe, "model.last": recipe}
    for name, recipe in {
        "float32": "float32",
        "8 bits": "int8(granularity=tensor)",
        "4 bits": "int4(granularity=tensor)",
        "2 bits": "int2(granularity=tensor)",
        "ternary": "bitnet_b158",
        "binary": "bitnet",
    }.items()
}
SEEDS = (0, 1, 2, 3, 4)
REPORT = (arms_table("valid_loss", "train_loss"), curves())
