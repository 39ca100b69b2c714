"""Runs of the study: loss against size, tokens and bits per weight, with a rate tuned for every precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_experiments.branching import train_longer
from bitnet_experiments.claims import Claim
from bitnet_experiments.intervals import Estimate
from bitnet_experiments.law_sections import PUBLISHED_GAMMA as _PUBLISHED_GAMMA
from bitnet_experiments.law_sections import (
    Place,
    factors,
    forms_table,
    gamma_table,
    measured_gamma,
)
from bitnet_experiments.runs import train
from bitnet_experiments.sections import arms_table
from bitnet_experiments.study import Row, Study, read_study
from bitnet_experiments.trends import Pairs, slope, trends_figure, trends_table

QUESTION = "What is loss as a function of size, tokens and bits per weight?"
SOURCE = "Kumar et al. 2411.04330, Chen et al. 2505.14302, Spectra 2407.12327"
PAPER_EFFECT = (
    "bits act as a factor 1 - exp(-P / 2.67) on size (Kumar et al.); their cost grows with tokens (Chen)"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "law_lm"
METRIC = "test_loss"
SEEDS = (0, 1, 2)
TUNE = {"optimizer.learning_rate": (0.004, 0.008, 0.016)}

_WIDTHS = {"55k": 48, "98k": 64, "221k": 96, "393k": 128, "885k": 192}
_SIZES = {
    "55k": 55_296,
    "98k": 98_304,
    "221k": 221_184,
    "393k": 393_216,
    "885k": 884_736,
}  # without embeddings
_RATIOS = (20, 40, 80, 160)  # bytes of text per parameter
_LONGEST = {"55k": 160, "98k": 160, "221k": 80, "393k": 40, "885k": 20}
_UPDATE = 2048  # bytes of text
_PRECISIONS = {
    "P1": "bitnet_channel",
    "P1.58": "bitnet_b158_channel",
    "P2": "int2",
    "P3": "int3",
    "P4": "int4",
    "P16": "float32",
}


def _arm(size: str, ratio: int, precision: str) -> str:
    return f"{size} D{ratio} {precision}"


def _settings(size: str, ratio: int, precision: str) -> dict[str, Any]:
    steps = ratio * _SIZES[size] // _UPDATE
    return {
        "model.hidden_size": _WIDTHS[size],
        "model.ffn_size": 3 * _WIDTHS[size],
        "model.precision": _PRECISIONS[precision],
        "training.steps": steps,
        "training.eval_every": steps,
        "training.checkpoint_every": steps * 4 // 5,  # where the decay begins
    }


ARMS = {
    _arm(size, ratio, precision): _settings(size, ratio, precision)
    for size in _SIZES
    for ratio in _RATIOS
    if ratio <= _LONGEST[size]
    for precision in _PRECISIONS
}
BASELINE = _arm("55k", 20, "P16")
SMALL_ARMS = tuple(_arm("98k", 20, precision) for precision in ("P1.58", "P16"))
SMALL_SEEDS = (0,)


def TUNED_AS(arm: str) -> str:
    return _arm("98k", 20, arm.split()[2])


def BLOCK(arm: str) -> str:
    """Size and ratio: precisions are compared within it."""
    return arm.rpartition(" ")[0]


def run(arm: str, seed: int, workdir: Path, small: bool, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Trains the arm, beginning with the updates that it shares with the arm of half as many tokens."""
    study = read_study(Path(__file__).parent)
    size, ratio, precision = arm.split()
    shorter = _arm(size, int(ratio[1:]) // 2, precision)
    rate = overrides["optimizer.learning_rate"]
    folders = {one: workdir / f"{one} {rate:g}-seed{seed}" for one in (arm, shorter)}
    config = study.settings(arm, seed, small, overrides)
    if shorter not in ARMS:
        return train(config, folders[arm])
    run(shorter, seed, workdir, small, overrides)
    return train_longer(
        study.settings(shorter, seed, small, overrides), folders[shorter], config, folders[arm]
    )


def _pairs_over_tokens(precision: str, size: str) -> Pairs:
    ratios = [ratio for ratio in _RATIOS if ratio <= _LONGEST[size]]
    return {
        ratio * _SIZES[size]: (_arm(size, ratio, precision), _arm(size, ratio, "P16")) for ratio in ratios
    }


def _pairs_over_size(precision: str, ratio: int) -> Pairs:
    sizes = [size for size in _SIZES if ratio <= _LONGEST[size]]
    return {_SIZES[size]: (_arm(size, ratio, precision), _arm(size, ratio, "P16")) for size in sizes}


def _ternary_over_tokens(study: Study, rows: Sequence[Row]) -> Estimate | None:
    return slope(study, rows, _pairs_over_tokens("P1.58", "55k"))


def _ternary_over_size(study: Study, rows: Sequence[Row]) -> Estimate | None:
    return slope(study, rows, _pairs_over_size("P1.58", 20))


def _place(arm: str) -> Place:
    size, ratio, precision = arm.split()
    millions = _SIZES[size] / 1e6
    return Place(millions, millions * float(ratio[1:]), float(precision[1:]))


_SUBSETS = {
    "all": None,
    "1 to 2 and 16 bits": lambda data: (data.P <= 2) | (data.P == 16),
    "3, 4 and 16 bits": lambda data: data.P >= 3,
    "20 and 40 bytes per parameter": lambda data: data.D / data.N < 60,
    "80 and 160 bytes per parameter": lambda data: data.D / data.N > 60,
}
CLAIMS = (
    Claim(
        says="the penalty of ternary weights shrinks with size (at 20 bytes per parameter)",
        measure=_ternary_over_size,
        less_than=0,
    ),
    Claim(
        says="it grows with tokens (Chen et al.; 55 thousand parameters)",
        measure=_ternary_over_tokens,
        greater_than=0,
    ),
    Claim(
        says="it does not depend on tokens (Kumar et al.): nats per decade",
        measure=_ternary_over_tokens,
        equivalent=0.01,
    ),
    Claim(
        says="gamma = 2.6745 (Kumar et al.), all runs",
        measure=measured_gamma(_place),
        between=(_PUBLISHED_GAMMA, _PUBLISHED_GAMMA),
    ),
    Claim(
        says="and below 3 bits, where they have no runs",
        measure=measured_gamma(_place, _SUBSETS["1 to 2 and 16 bits"]),
        between=(_PUBLISHED_GAMMA, _PUBLISHED_GAMMA),
    ),
)
_FEW = ("P1", "P1.58", "P2", "P3", "P4")
_OVER_SIZE = {f"{bits} minus P16": _pairs_over_size(bits, 20) for bits in _FEW}
_OVER_TOKENS = {f"{bits} minus P16": _pairs_over_tokens(bits, "55k") for bits in _FEW}
REPORT = (
    arms_table(against=lambda arm: f"{arm.rpartition(' ')[0]} P16"),
    trends_table(_OVER_SIZE),
    trends_table(_OVER_TOKENS, unit="bytes of text"),
    forms_table(_place),
    gamma_table(_place, _SUBSETS),
    factors("factors", _place),
    trends_figure("size", _OVER_SIZE, xlabel="parameters, at 20 bytes of text for each"),
    trends_figure("tokens", _OVER_TOKENS, xlabel="bytes of text, at 55 thousand parameters"),
)
