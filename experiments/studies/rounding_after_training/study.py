"""Runs of the study: weights trained at a precision, or trained in float and rounded to it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.runs import measure, train
from bitnet_experiments.sections import arms_table
from bitnet_experiments.study import read_study
from bitnet_jax.training import load_image_run

QUESTION = "Must a network be trained at the precision it is deployed with?"
SOURCE = "BitNetMCU, table of quantization after training (w = 64)"
PAPER_EFFECT = "accuracy at 1 bit 97.0 trained, 51.7 rounded; at 2 bits 97.7 and 80.1; at 8 bits equal"
SOURCE_TASK, TASK = "image classification", "image classification"
REDO = "13 of 35 rows are of uncommitted code"
CLAIMS = (
    Claim(
        says="1 bit: rounded 45.3 points worse than trained",
        contrast=("binary rounded", "binary trained"),
        between=(45.3, 45.3),
    ),
    Claim(
        says="2 bits: rounded 17.6 points worse",
        contrast=("2 bits rounded", "2 bits trained"),
        between=(17.6, 17.6),
    ),
    Claim(
        says="8 bits: equal, within the source's 0.2 points",
        contrast=("8 bits rounded", "8 bits trained"),
        equivalent=0.2,
    ),
)

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "float32"

_NETWORK = {
    "model.hidden_size": 64,
    "model.norm": "rmsnorm",  # before each layer, without gain
    "model.activation": "relu",
    "optimizer.learning_rate": 1e-3,
}
_RECIPES = {"8 bits": "int8(granularity=tensor)", "2 bits": "int2(granularity=tensor)", "binary": "bitnet"}


def _all_layers(recipe: str) -> dict[str, Any]:
    return {**_NETWORK, "model.precision": recipe, "model.first": recipe, "model.last": recipe}


ARMS = {"float32": _all_layers("float32")} | {
    f"{name} {how}": _all_layers(recipe)
    for name, recipe in _RECIPES.items()
    for how in ("trained", "rounded")
}
SEEDS = (0, 1, 2, 3, 4)
REPORT = (arms_table("valid_loss"),)


def TRAINED_MODEL(arm: str) -> str:
    return BASELINE if arm.endswith(" rounded") else arm


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    """A rounded arm evaluates the weights of the float arm at its own precision."""
    study = read_study(Path(__file__).parent)
    if not arm.endswith(" rounded"):
        return train(study.settings(arm, seed, small), workdir / f"{arm}-seed{seed}")
    folder = workdir / f"{BASELINE}-seed{seed}"
    trained = train(study.settings(BASELINE, seed, small), folder)
    _, _, variables = load_image_run(folder)
    return {"parameters": trained["parameters"], "tokens": trained["tokens"]} | measure(
        study.settings(arm, seed, small), variables["params"]
    )
