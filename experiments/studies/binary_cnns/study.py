"""Runs of the study: a convolutional network with each of the early binary schemes, with and without shortcuts."""

from __future__ import annotations

from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves, pairs_table

QUESTION = (
    "How much accuracy do early binary schemes cost a convolutional network, and do shortcuts recover it?"
)
SOURCE = "LAB 1611.01600 (CIFAR-10, one protocol for five schemes); Bi-Real Net as run by ReSTE's authors"
PAPER_EFFECT = (
    "float 11.9 % error, W1 9.9 to 11.0, W1A1 12.4 to 12.9; W1A1 accuracy 86.75, 87.92 with shortcuts"
)
SOURCE_TASK, TASK = "image classification", "image classification"
CLAIMS = (
    Claim(
        says="BinaryConnect 2.04 points below float",
        contrast=("BinaryConnect", "float32"),
        between=(-2.04, -2.04),
    ),
    Claim(says="BWN 0.87 points below float", contrast=("BWN", "float32"), between=(-0.87, -0.87)),
    Claim(says="BNN 0.97 points above float", contrast=("BNN", "float32"), between=(0.97, 0.97)),
    Claim(says="XNOR-Net 0.47 points above float", contrast=("XNOR-Net", "float32"), between=(0.47, 0.47)),
    Claim(
        says="shortcuts gain 1.17 points (ResNet-20)",
        contrast=("Bi-Real", "Bi-Real, no shortcuts"),
        between=(-1.17, -1.17),
    ),
)

CONFIG = "mnist_cnn"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "float32"

COMMON = {"model.widths": (16, 32), "training.steps": 600}  # one epoch
SMALL = {"model.widths": (8, 16), "training.steps": 120}


def _arm(recipe: str, shortcut: bool = False) -> dict[str, Any]:
    return {"model.precision": recipe, "model.shortcut": shortcut}


ARMS = {
    "float32": _arm("float32"),
    "LSQ, W4A4": _arm("lsq4"),
    "BinaryConnect": _arm("binaryconnect"),
    "BWN": _arm("bwn"),
    "BNN": _arm("bnn"),
    "XNOR-Net": _arm("xnor"),
    "XNOR-Net, shortcuts": _arm("xnor", shortcut=True),
    "Bi-Real, no shortcuts": _arm("bireal"),
    "Bi-Real": _arm("bireal", shortcut=True),
}
SEEDS = (0, 1, 2)
REPORT = (
    arms_table("valid_loss", "train_loss", "weight_bits"),
    pairs_table(
        ("BWN", "BinaryConnect"),
        ("XNOR-Net", "BNN"),
        ("BNN", "BinaryConnect"),
        ("XNOR-Net, shortcuts", "XNOR-Net"),
        ("Bi-Real", "Bi-Real, no shortcuts"),
    ),
    curves(),
)
