"""Runs of the study: one scale per matrix, per row, and per group of 256, 128 and 64 weights of a row."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves

QUESTION = "Do finer scales help binary and ternary weights?"
SOURCE = "BitNet 2310.11453, section 2.1; Spectra 2407.12327, appendix A.4"
PAPER_EFFECT = "none to be seen"
SOURCE_TASK, TASK = "language modelling", "language modelling"
CLAIMS = (
    Claim(
        says="no visible change of the loss, ternary, finest groups",
        contrast=("ternary, 64", "ternary, tensor"),
        equivalent=0.02,
    ),
    Claim(
        says="no visible change of the loss, binary, finest groups",
        contrast=("binary, 64", "binary, tensor"),
        equivalent=0.02,
    ),
)

CONFIG = "study_lm"
METRIC = "valid_loss"
BASELINE = "ternary, tensor"

# Wide enough for groups of 256; a fraction of an epoch, to save time.
COMMON = {
    "model.hidden_size": 256,
    "model.ffn_size": 512,
    "model.num_layers": 1,
    "training.steps": 250,
}
SMALL = {"training.steps": 60}
SMALL_ARMS = ("ternary, tensor", "ternary, 64", "binary, tensor", "binary, 64")
ARMS = {
    f"{name}, {grain}": {"model.precision": recipe + suffix}
    for name, recipe in (("ternary", "bitnet_b158"), ("binary", "bitnet"))
    for grain, suffix in (
        ("tensor", ""),
        ("channel", "_channel"),
        ("256", "_group256"),
        ("128", "_group128"),
        ("64", "_group64"),
    )
}
SEEDS = (0, 1, 2)
REPORT = (arms_table("model_bytes", against=lambda arm: f"{arm.partition(',')[0]}, tensor"), curves())
