"""Runs of the study: what becomes of the attention scores of a small ternary language model."""

from __future__ import annotations

from bitnet_experiments.sections import arms_table, curves

QUESTION = "Can attention do without softmax?"
SOURCE = "ReLU/L 2309.08586, ReLA 2104.07012, linear attention (Katharopoulos 2020)"
PAPER_EFFECT = "ReLU divided by the number of keys near softmax; elu + 1 linear worse by about 0.1 in ln PPL"
VERDICT = "reproduced"
EFFECT = "linear"

CONFIG = "study_lm"
METRIC = "valid_loss"  # nats per character over all held-out text, after the last step
BASELINE = "softmax"

# The norm in front of o_proj (placement "sub") is in all arms; with "relu" it makes ReLA of ReLU/L.
ARMS = {kind: {"model.attention": kind} for kind in ("softmax", "relu", "linear")}
SEEDS = (0, 1, 2)
REPORT = (arms_table("train_loss"), curves())
