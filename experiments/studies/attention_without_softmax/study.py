"""Runs of the study: alternatives to softmax attention in a small ternary language model."""

from __future__ import annotations

from bitnet_experiments.sections import arms_table, curves

QUESTION = "Can attention do without softmax?"
SOURCE = "ReLU/L 2309.08586, ReLA 2104.07012, linear attention (Katharopoulos 2020)"
PAPER_EFFECT = "ReLU / number of keys is close to softmax; linear with elu + 1 worse by about 0.1 in ln PPL"
VERDICT = "reproduced"
EFFECT = "linear"

CONFIG = "study_lm"
METRIC = "valid_loss"  # nats per character over all held-out text, after the last step
BASELINE = "softmax"

# All arms have the norm before o_proj (placement "sub"); with "relu" it turns ReLU/L into ReLA.
ARMS = {kind: {"model.attention": kind} for kind in ("softmax", "relu", "linear")}
SEEDS = (0, 1, 2)
REPORT = (arms_table("train_loss"), curves())
