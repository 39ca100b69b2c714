"""Runs of the study: BinaryConnect's deterministic and stochastic signs, and the latents of the latter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.runs import measure, train
from bitnet_experiments.sections import arms_table, curves
from bitnet_experiments.study import read_study
from bitnet_jax.training import load_image_run

QUESTION = "Does stochastic binarization of the weights regularize?"
SOURCE = "BinaryConnect 1511.00363"
PAPER_EFFECT = "MNIST: float 1.30 % error, deterministic 1.29, stochastic 1.18; higher training loss"
SOURCE_TASK, TASK = "image classification", "image classification"
REDO = "9 of 21 rows are of uncommitted code"
CANNOT_SHOW = (
    "After 5 epochs (the source: up to 1000) under 1 % of the stochastic arms' latents are at ±1, so that signs are "
    "still drawn almost at random."
)
CLAIMS = (
    Claim(
        says="stochastic signs, evaluated with real weights, have 0.11 points less test error",
        contrast=("stochastic, real weights", "deterministic"),
        between=(-0.11, -0.11),
    ),
    Claim(
        says="and a higher training loss",
        contrast=("stochastic", "deterministic"),
        metric="train_loss",
        greater_than=0,
    ),
)

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "deterministic"

_NETWORK = {"model.activation": "relu"}
_WIDE = {"model.init_std": 3**-0.5}  # of BinaryConnect's initial latents, uniform in [-1, 1]
ARMS = {
    "float32": {**_NETWORK, "model.precision": "float32"},
    "deterministic": {**_NETWORK, "model.precision": "binaryconnect"},
    "stochastic": {**_NETWORK, "model.precision": "binaryconnect_stochastic"},
    # of the stochastic arm, with its real-valued latents
    "stochastic, real weights": {**_NETWORK, "model.precision": "float32"},
    "wide deterministic": {**_NETWORK, **_WIDE, "model.precision": "binaryconnect"},
    "wide stochastic": {**_NETWORK, **_WIDE, "model.precision": "binaryconnect_stochastic"},
    "wide stochastic, real weights": {**_NETWORK, **_WIDE, "model.precision": "float32"},
}
SEEDS = (0, 1, 2)
REPORT = (
    arms_table("valid_loss", "train_loss"),
    curves(arms=("float32", "deterministic", "stochastic", "wide deterministic", "wide stochastic")),
)


def TRAINED_MODEL(arm: str) -> str:
    return arm.removesuffix(", real weights")


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    """Real weights: the stochastic arm evaluated with its latents instead of their signs."""
    study = read_study(Path(__file__).parent)
    trained = arm.removesuffix(", real weights")
    folder = workdir / f"{trained}-seed{seed}"
    row = train(study.settings(trained, seed, small), folder)
    if arm == trained:
        return row
    _, _, variables = load_image_run(folder)
    state = {"batch_stats": variables["batch_stats"]}
    kept = {name: row[name] for name in ("parameters", "tokens", "train_loss")}
    return kept | measure(study.settings(arm, seed, small), variables["params"], state)
