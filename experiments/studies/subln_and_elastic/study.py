"""Runs of the study: norm placements and activation scales for binary weights."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves, pairs_table

QUESTION = "Do a norm before every quantized projection and absmax scales help?"
SOURCE = "BitNet 2310.11453, table 4"
PAPER_EFFECT = (
    "perplexity 20.34 SubLN absmax, 22.11 Pre-LN absmax, 24.05 Pre-LN elastic: -0.08 and +0.08 nats"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"
CLAIMS = (
    Claim(
        says="SubLN gains 0.083 nats over Pre-LN",
        contrast=("SubLN absmax", "Pre-LN absmax"),
        between=(-0.083, -0.083),
    ),
    Claim(
        says="elastic scales lose 0.084 nats",
        contrast=("Pre-LN elastic", "Pre-LN absmax"),
        between=(0.084, 0.084),
    ),
)

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "Pre-LN absmax"
SEEDS = (0, 1, 2, 3, 4)

_ABSMAX = {"model.precision": "bitnet"}
# BiT's elastic function at eight bits: a learned scale per layer instead of the absmax of each token.
_ELASTIC = {
    "model.precision": {
        "weight": "binary_centred",
        "activation": "int8",
        "activation_ste": "clipped",
        "activation_scale": "learned",
    }
}
ARMS = {
    "Pre-LN absmax": {"model.norm_placement": "pre", **_ABSMAX},
    "SubLN absmax": {"model.norm_placement": "inside", **_ABSMAX},
    "sub norms absmax": {"model.norm_placement": "sub", **_ABSMAX},
    "Pre-LN elastic": {"model.norm_placement": "pre", **_ELASTIC},
    "SubLN elastic": {"model.norm_placement": "inside", **_ELASTIC},
}

REPORT = (
    arms_table(),
    pairs_table(("SubLN elastic", "SubLN absmax"), ("sub norms absmax", "SubLN absmax")),
    curves(),
)
