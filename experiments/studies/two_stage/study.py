"""Runs of the study: the lower second learning rate and the end of weight decay, each with and without."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.study import product

QUESTION = "Do a lower learning rate and no weight decay in the second half help ternary models?"
SOURCE = "Training Tips (2024), figure 1b; Spectra 2407.12327, table 11"
PAPER_EFFECT = (
    "both: -0.05 nats relative to neither (3.22 and 3.27, read off a curve); both < decay < rate < neither"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"
CLAIMS = (
    Claim(
        says="both: -0.05 nats, read off a curve within 0.02",
        contrast=("two rates, no decay", "one rate, decay"),
        between=(-0.07, -0.03),
    ),
    Claim(
        says="no decay in the second half alone helps",
        contrast=("one rate, no decay", "one rate, decay"),
        less_than=0,
    ),
    Claim(says="the second rate alone helps", contrast=("two rates, decay", "one rate, decay"), less_than=0),
)

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "one rate, decay"
SEEDS = (0, 1, 2, 3, 4)

ARMS = product(
    {
        "one rate": {"optimizer.schedule": "linear"},
        "two rates": {
            "optimizer.schedule": "two_stage",
            "optimizer.second_learning_rate": 2e-3,  # two thirds of the first, as at 700 M parameters
            "optimizer.stage_switch": 0.5,
        },
    },
    {
        "decay": {"optimizer.weight_decay_until": 1.0},
        "no decay": {"optimizer.weight_decay_until": 0.5},
    },
    join=", ",
)
