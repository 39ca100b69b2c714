"""Runs of the study: a byte-level language model at six precisions, packed and evaluated downstream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_experiments.claims import Claim
from bitnet_experiments.runs import train
from bitnet_experiments.sections import Point, Row, arms_table, measures_table, points
from bitnet_experiments.study import load_study
from bitnet_jax.data.corpus import load_corpus
from bitnet_jax.evaluation.energy import joules, operations
from bitnet_jax.evaluation.language import evaluate_text
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.tasks import run_task
from bitnet_jax.inference.generation import greedy
from bitnet_jax.models import ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.training.load import load_run

QUESTION = "What do fewer bits cost in downstream quality, and gain in bytes, tokens per second and joules?"
SOURCE = "Spectra 2407.12327 (tasks by bits), BitNet b1.58 2402.17764 (memory, speed, energy by size)"
PAPER_EFFECT = "ternary approaches float as size grows; accuracy per byte is better with fewer bits"
SOURCE_TASK, TASK = "language modelling", "language modelling"
CANNOT_SHOW = "The source is about many sizes and this study has one; its models are at chance on BLiMP."
CLAIMS = (
    Claim(
        says="ternary approaches float downstream as size grows: here BLiMP at one size",
        contrast=("ternary A8", "float32"),
        metric="blimp_accuracy",
        equivalent=1.0,
    ),
    Claim(
        says="fewer bits are faster",
        contrast=("ternary A8", "float32"),
        metric="tokens_per_second",
        greater_than=0,
    ),
)

CONFIG = "byte_lm"
METRIC = "valid_bits_per_byte"
TEST_EXAMPLES = {"blimp_accuracy": 2_010}
BASELINE = "float32"

_LENGTH = 128
COMMON = {
    "model.num_layers": 2,
    "model.hidden_size": 128,
    "model.ffn_size": 384,
    "model.max_length": 2 * _LENGTH,
    "model.embedding_dtype": "float32",
    "data.source": "lm/enwiki2021.train.jsonl.gz",
    "data.valid_source": "lm/enwiki2021.valid.jsonl.gz",
    "data.length": _LENGTH,
    "data.sampling": "windows",
    "training.steps": 400,
    "training.eval_every": 200,
    "training.checkpoint_every": 400,
    "evaluation.batches": 64,
}
SMALL = {
    "data.source": "stdlib",
    "data.valid_source": None,
    "training.steps": 60,
    "training.checkpoint_every": 60,
    "evaluation.batches": 8,
}
ARMS = {
    name: {"model.precision": recipe}
    for name, recipe in {
        "float32": "float32",
        "W8A8": "int8",
        "W4A8": "int4",
        "ternary A8": "bitnet_b158",
        "W1A8": "bitnet",
        "W1A1": "bit",
    }.items()
}
SEEDS = (0, 1, 2)


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    """Trains, packs, and measures the packed model: other text, minimal pairs, speed; energy is counted.

    --small reads no data, so it omits other text and minimal pairs.
    """
    folder = workdir / f"{arm}-seed{seed}"
    row = train(load_study("downstream_ladder").settings(arm, seed, small), folder)
    if row["status"] != "finished":
        return row
    _, config, params, tokenizer = load_run(folder)
    variables = packing.for_this_platform(packing.pack(params, config))
    row["packed_bytes"] = packing.sizes(variables).total
    row["microjoules"] = 1e6 * joules(operations(config, _LENGTH), head=True).total / _LENGTH
    row["tokens_per_second"] = _speed(config, variables)
    if not small:
        play = load_corpus("lm/tinyshakespeare.txt.gz", tokenizer=tokenizer, split="tail", valid_fraction=0.1)
        row["shakespeare_bits_per_byte"] = evaluate_text(
            config, variables, play.valid, play.valid_token_bytes, length=_LENGTH
        ).bits_per_byte
        blimp = run_task(TextModel(config, variables, tokenizer), "blimp", limit=2010)
        row["blimp_accuracy"] = 100 * blimp["metrics"]["acc"]["value"]
    return row


def _speed(config: ModelConfig, variables: Mapping[str, Any]) -> float:
    """Tokens per second of greedy decoding: the median over seven texts of _LENGTH tokens, after a warm-up."""
    prompt = np.array([[32]], np.int32)

    def seconds() -> float:
        began = time.perf_counter()
        greedy(config, variables, prompt, None, _LENGTH).block_until_ready()
        return time.perf_counter() - began

    seconds()
    return _LENGTH / statistics.median(seconds() for _ in range(7))


def _place(axis: str) -> Callable[[str, Row], Point]:
    return lambda arm, row: Point(row[axis], "", arm)


REPORT = (
    arms_table("weight_bits", "packed_bytes"),
    measures_table("shakespeare_bits_per_byte", "blimp_accuracy", "tokens_per_second", "microjoules"),
    points(
        "bytes",
        _place("packed_bytes"),
        xlabel="bytes of the packed model",
        ylabel="held-out bits per byte",
        joined=False,
    ),
    points(
        "energy",
        _place("microjoules"),
        xlabel="estimated energy of a token, 7 nm (µJ)",
        ylabel="held-out bits per byte",
        xscale="log",
        joined=False,
    ),
    points(
        "blimp",
        _place("packed_bytes"),
        metric="blimp_accuracy",
        xlabel="bytes of the packed model",
        ylabel="BLiMP accuracy (%)",
        joined=False,
    ),
)
