"""Runs of the study: model files of equal size at 1 to 8 bits per weight, trained on three amounts of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_experiments.branching import train_longer
from bitnet_experiments.claims import Claim
from bitnet_experiments.intervals import Estimate
from bitnet_experiments.precision_map import Place, map_figure, map_table
from bitnet_experiments.runs import train
from bitnet_experiments.sections import arms_table
from bitnet_experiments.study import Row, Study, read_study
from bitnet_experiments.trends import Pairs, slope, trends_figure, trends_table

QUESTION = "Which bits per weight are best at a fixed size of the model file?"
SOURCE = "Parameter Golf logs (2026); 1-Bit Wonder 2602.15563"
PAPER_EFFECT = (
    "6 bits beat ternary and binary at 16 MB in ten minutes of 8 H100; 1 bit is best with long training"
)
CANNOT_SHOW = (
    "Learning rates are searched at 64 KiB with one seed. Those of 6 and 8 bits are too high for larger files: with 6 "
    "bits the loss at 256 KiB is above that at 128 KiB."
)
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "law_lm"
COMMON = {"model.embedding_dtype": "int8"}
METRIC = "test_loss"
SEEDS = (0, 1, 2)
TUNE = {"optimizer.learning_rate": (0.004, 0.008, 0.016)}

_UPDATE = 2048  # bytes of text
_FILES = {"64K": 2**16, "128K": 2**17, "256K": 2**18}
_TEXTS = {"1M": 2**20, "4M": 2**22, "16M": 2**24}
_LONGEST = {"64K": "16M", "128K": "4M", "256K": "4M"}
_WEIGHTS: dict[str, Any] = {
    "P1": "bitnet_channel",
    "P1.58": "bitnet_b158_channel",
    "P2": "int2",
    "P4": "int4",
    "P6": {"weight": "int6", "activation": "int8", "granularity": "channel"},
    "P8": "int8",
}
# Layers, width and inner width that fill the file and are closest to 2 layers and an inner width of 3 times the width.
_SHAPES = {
    "64K": {"P1": (2, 96, 272), "P1.58": (3, 64, 232), "P2": (3, 64, 184), "P4": (2, 64, 144), "P6": (4, 32, 128),
            "P8": (3, 32, 136)},
    "128K": {"P1": (3, 128, 368), "P1.58": (2, 128, 384), "P2": (3, 96, 296), "P4": (2, 96, 224), "P6": (3, 64, 168),
             "P8": (2, 64, 208)},
    "256K": {"P1": (3, 192, 592), "P1.58": (2, 192, 600), "P2": (4, 128, 376), "P4": (2, 128, 416),
             "P6": (3, 96, 240), "P8": (2, 96, 288)},
}  # fmt: skip


def _arm(file: str, text: str, bits: str) -> str:
    return f"{file} {text} {bits}"


def _settings(file: str, text: str, bits: str) -> dict[str, Any]:
    layers, width, inner = _SHAPES[file][bits]
    steps = _TEXTS[text] // _UPDATE
    return {
        "model.num_layers": layers,
        "model.hidden_size": width,
        "model.ffn_size": inner,
        "model.precision": _WEIGHTS[bits],
        "training.steps": steps,
        "training.eval_every": steps,
        "training.checkpoint_every": steps * 4 // 5,  # where the decay begins
    }


ARMS = {
    _arm(file, text, bits): _settings(file, text, bits)
    for file in _FILES
    for text in _TEXTS
    if _TEXTS[text] <= _TEXTS[_LONGEST[file]]
    for bits in _WEIGHTS
}
BASELINE = _arm("64K", "1M", "P4")
SMALL_ARMS = tuple(_arm("64K", "1M", bits) for bits in ("P1.58", "P4"))
SMALL_SEEDS = (0,)


def TUNED_AS(arm: str) -> str:
    return _arm("64K", "1M", arm.split()[2])


def BLOCK(arm: str) -> str:
    """File and text: precisions are compared within it."""
    return arm.rpartition(" ")[0]


def run(arm: str, seed: int, workdir: Path, small: bool, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Trains the arm, beginning with the updates that it shares with the arm of less text."""
    study = read_study(Path(__file__).parent)
    file, text, bits = arm.split()
    rate = overrides["optimizer.learning_rate"]
    folders = {one: workdir / f"{_arm(file, one, bits)} {rate:g}-seed{seed}" for one in _TEXTS}
    config = study.settings(arm, seed, small, overrides)
    names = list(_TEXTS)
    if text == names[0]:
        return train(config, folders[text])
    before = names[names.index(text) - 1]
    shorter = _arm(file, before, bits)
    run(shorter, seed, workdir, small, overrides)
    return train_longer(
        study.settings(shorter, seed, small, overrides), folders[before], config, folders[text]
    )


def _place(arm: str) -> Place:
    file, text, bits = arm.split()
    return Place(_FILES[file], _TEXTS[text], float(bits[1:]))


def _over_text(bits: str, other: str, file: str) -> Pairs:
    texts = [text for text in _TEXTS if _arm(file, text, bits) in ARMS]
    return {_TEXTS[text]: (_arm(file, text, bits), _arm(file, text, other)) for text in texts}


def _binary_over_text(study: Study, rows: Sequence[Row]) -> Estimate | None:
    return slope(study, rows, _over_text("P1", "P6", "64K"))


CLAIMS = (
    Claim(
        says="6 bits beat 1.58 bits when training is short (Parameter Golf): 256 KiB, 1 MiB of text",
        contrast=(_arm("256K", "1M", "P6"), _arm("256K", "1M", "P1.58")),
        less_than=0,
    ),
    Claim(
        says="1.58 bits beat 1 bit when training is short (Parameter Golf): 256 KiB, 1 MiB of text",
        contrast=(_arm("256K", "1M", "P1.58"), _arm("256K", "1M", "P1")),
        less_than=0,
    ),
    Claim(
        says="1 bit beats 4 bits when training is long (1-Bit Wonder): 64 KiB, 16 MiB of text",
        contrast=(_arm("64K", "16M", "P1"), _arm("64K", "16M", "P4")),
        less_than=0,
    ),
    Claim(
        says="the longer the training, the better are few bits: 1 bit minus 6 bits over text, 64 KiB, nats per decade",
        measure=_binary_over_text,
        less_than=0,
    ),
)
_FEW = ("P1", "P1.58", "P2", "P4", "P8")
_AT_64K = {f"{bits} minus P6": _over_text(bits, "P6", "64K") for bits in _FEW}
REPORT = (
    map_figure("map", _place),
    map_table(_place),
    trends_table(_AT_64K, unit="bytes of text"),
    trends_figure("text", _AT_64K, xlabel="bytes of text, files of 64 KiB"),
    arms_table(against=lambda arm: f"{arm.rpartition(' ')[0]} P6"),
)
