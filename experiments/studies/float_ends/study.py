"""Runs of the study: a binary convolutional network whose first and last layer are float, W1 or W1A1."""

from __future__ import annotations

from bitnet_experiments.sections import arms_table, curves

QUESTION = "How much accuracy do float first and last layers recover in a binary network?"
SOURCE = "larq's plot data of BinaryNet on CIFAR-10"
PAPER_EFFECT = (
    "accuracy 83.9 with float first and last layers, 81.9 with binary weights, 66.5 with binary inputs"
)
VERDICT = "reproduced"
EFFECT = "W1A1 ends"

CONFIG = "mnist_cnn"
METRIC = "valid_error"  # per cent of the test images
BASELINE = "float ends"

_NETWORK = {"model.precision": "bnn", "model.widths": (16, 32), "model.convolutions": 1}
ARMS = {
    "float ends": {**_NETWORK, "model.first": "float32", "model.last": "float32"},
    "W1 ends": {**_NETWORK, "model.first": "binaryconnect", "model.last": "binaryconnect"},
    "W1A1 ends": {**_NETWORK, "model.first": "bnn", "model.last": "bnn"},
}
SEEDS = (0, 1, 2)
REPORT = (arms_table("valid_loss", "train_loss"), curves())
