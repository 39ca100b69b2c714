"""Runs of the study: a multilayer perceptron with each of the early binary schemes."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves, pairs_table

QUESTION = "How much accuracy do early binary schemes cost a multilayer perceptron?"
SOURCE = "one protocol for five schemes in LAB 1611.01600 (MNIST, 3 x 2048, 50 epochs)"
PAPER_EFFECT = "float 1.19 % error, BinaryConnect 1.28, BWN 1.20, BNN 1.47, XNOR-Net 1.45"
SOURCE_TASK, TASK = "image classification", "image classification"
CLAIMS = (
    Claim(
        says="BinaryConnect 0.09 points above float",
        contrast=("BinaryConnect", "float32"),
        between=(0.09, 0.09),
    ),
    Claim(says="BWN 0.01 points above float", contrast=("BWN", "float32"), between=(0.01, 0.01)),
    Claim(says="BNN 0.28 points above float", contrast=("BNN", "float32"), between=(0.28, 0.28)),
    Claim(says="XNOR-Net 0.26 points above float", contrast=("XNOR-Net", "float32"), between=(0.26, 0.26)),
)

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "float32"

ARMS = {
    name: {"model.precision": recipe}
    for name, recipe in {
        "float32": "float32",
        "LSQ, W4A4": "lsq4",
        "BinaryConnect": "binaryconnect",
        "BinaryConnect, drawn": "binaryconnect_stochastic",
        "BWN": "bwn",
        "BNN": "bnn",
        "Bi-Real": "bireal",
        "XNOR-Net": "xnor",
    }.items()
}
SEEDS = (0, 1, 2, 3, 4)
REPORT = (
    arms_table("valid_loss", "train_loss", "weight_bits"),
    pairs_table(("BWN", "BinaryConnect"), ("XNOR-Net", "BNN"), ("Bi-Real", "BNN"), ("BNN", "BinaryConnect")),
    curves(),
)
