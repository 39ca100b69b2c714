"""Runs of the study: binary weights with and without a scale, with and without a following batch norm."""

from __future__ import annotations

from bitnet_experiments.sections import arms_table, curves
from bitnet_experiments.study import product

QUESTION = "Do binary weights need a scale where no norm follows?"
SOURCE = "LAB 1611.01600 (table of character LSTMs)"
PAPER_EFFECT = "without a norm: no scale +1.6 nats or divergence, with mean|W| +0.02 to 0.06 nats"
VERDICT = "reproduced"
EFFECT = "no norm, no scale"

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
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
