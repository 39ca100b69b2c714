"""Runs of the study: alternatives to softmax attention in a small ternary language model."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves

QUESTION = "Can attention do without softmax?"
SOURCE = "ReLU/L 2309.08586, ReLA 2104.07012, linear attention (Katharopoulos 2020)"
PAPER_EFFECT = "ReLU / number of keys is close to softmax; linear attention with elu + 1 is worse"
SOURCE_TASK, TASK = "translation", "language modelling"
CLAIMS = (
    Claim(
        says="ReLU divided by the number of keys matches softmax (ReLU/L: same scaling; ReLA: BLEU within 0.7)",
        contrast=("relu", "softmax"),
        equivalent=0.02,
    ),
    Claim(says="linear attention with elu + 1 is worse", contrast=("linear", "softmax"), greater_than=0),
)

CONFIG = "study_lm"
METRIC = "valid_loss"  # nats per character over all held-out text, after the last step
BASELINE = "softmax"

# All arms have the norm before o_proj (placement "sub"); with "relu" it turns ReLU/L into ReLA.
ARMS = {kind: {"model.attention": kind} for kind in ("softmax", "relu", "linear")}
SEEDS = (0, 1, 2)
REPORT = (arms_table("train_loss"), curves())
