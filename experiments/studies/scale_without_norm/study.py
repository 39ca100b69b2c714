"""Runs of the study: binary weights with and without a scale, with and without a following batch norm."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves
from bitnet_experiments.study import product

QUESTION = "Do binary weights need a scale where no norm follows?"
SOURCE = "LAB 1611.01600 (table of character LSTMs)"
PAPER_EFFECT = "without a norm: no scale +1.6 nats or divergence, with mean|W| +0.02 to 0.06 nats"
SOURCE_TASK, TASK = "language modelling", "image classification"
REDO = "all rows are of uncommitted code"
CLAIMS = (
    Claim(
        says="without norm and scale, binary weights are much worse",
        contrast=("no norm, no scale", "no norm, float32"),
        greater_than=0,
    ),
    Claim(
        says="with the scale mean|W| they are close to float",
        contrast=("no norm, scale", "no norm, float32"),
        equivalent=0.2,
    ),
    Claim(
        says="where a norm follows the scale does not matter",
        contrast=("batch norm, scale", "batch norm, no scale"),
        equivalent=0.2,
    ),
)

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "no norm, float32"

# The same sign, identity gradient and clipping of latents: only the factor mean|W| differs.
_SCALED = {"weight": "binary", "latent_clip": 1.0, "weight_options": {"window": "raw"}}
ARMS = product(
    {
        "no norm": {"model.norm": "none", "model.activation": "relu"},
        "batch norm": {"model.norm": "batch", "model.activation": "relu"},
    },
    {
        "float32": {"model.precision": "float32"},
        "scale": {"model.precision": _SCALED},
        "no scale": {"model.precision": "binaryconnect"},
    },
    join=", ",
)
SEEDS = (0, 1, 2)
REPORT = (arms_table("valid_loss", "train_loss"), curves())
