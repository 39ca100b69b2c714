"""Runs of the study: a binary convolutional network whose first and last layer are float, W1 or W1A1."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves

QUESTION = "How much accuracy do float first and last layers recover in a binary network?"
SOURCE = "larq's plot data of BinaryNet on CIFAR-10"
PAPER_EFFECT = (
    "accuracy 83.9 with float first and last layers, 81.9 with binary weights, 66.5 with binary inputs"
)
SOURCE_TASK, TASK = "image classification", "image classification"
REDO = "all rows are of uncommitted code"
CLAIMS = (
    Claim(
        says="binary weights in the ends cost 2.0 points",
        contrast=("W1 ends", "float ends"),
        between=(2.0, 2.0),
    ),
    Claim(
        says="binary weights and inputs there cost 17.4 points",
        contrast=("W1A1 ends", "float ends"),
        between=(17.4, 17.4),
    ),
)

CONFIG = "mnist_cnn"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "float ends"

_NETWORK = {"model.precision": "bnn", "model.widths": (16, 32), "model.convolutions": 1}
ARMS = {
    "float ends": {**_NETWORK, "model.first": "float32", "model.last": "float32"},
    "W1 ends": {**_NETWORK, "model.first": "binaryconnect", "model.last": "binaryconnect"},
    "W1A1 ends": {**_NETWORK, "model.first": "bnn", "model.last": "bnn"},
}
SEEDS = (0, 1, 2)
REPORT = (arms_table("valid_loss", "train_loss"), curves())
