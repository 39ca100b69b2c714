"""Runs of the study: three precisions and three seeds in one setting."""

from __future__ import annotations

from bitnet_experiments.claims import Claim

QUESTION = "What do ternary and binary weights cost a tiny GPT?"
SOURCE = "log of babyBitNet, one seed"
PAPER_EFFECT = "ternary: 0.09 to 0.11 nats"
SOURCE_TASK, TASK = "language modelling", "language modelling"
REDO = "8 of 9 rows are of uncommitted code"
CLAIMS = (Claim(says="ternary: 0.09 to 0.11 nats", contrast=("ternary", "float32"), between=(0.09, 0.11)),)

CONFIG = "tiny_shakespeare"
METRIC = "valid_loss"  # nats per character, mean over all held-out text after the last step
BASELINE = "float32"

# The reference trained its float model at 1e-3 and its quantized one at 9e-4; we did not search either.
ARMS = {
    "float32": {"model.precision": "float32", "optimizer.learning_rate": 1e-3},
    "ternary": {"model.precision": "bitnet_b158", "optimizer.learning_rate": 9e-4},
    "binary": {"model.precision": "bitnet", "optimizer.learning_rate": 9e-4},
}
SEEDS = (1337, 1338, 1339)
