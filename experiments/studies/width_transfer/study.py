"""Runs of the study: four learning rates at two widths, in float32 and ternary, with and without width transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_experiments.claims import Claim
from bitnet_experiments.intervals import Estimate, interval
from bitnet_experiments.sections import Point, Section, arms_table, markdown_table, points
from bitnet_experiments.study import Study

QUESTION = "Does the best learning rate of a few-bit model move with width, and does muP hold it still?"
SOURCE = "muP 2203.03466, table 8 and figure 1 (float); for few bits derived in training/width_transfer.py"
PAPER_EFFECT = (
    "float: moves to smaller rates with width in the usual parametrization, stays in muP; few bits: open"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"
SEEDS = (0, 1, 2)
COMMON = {
    "data.batch_size": 8,
    "training.steps": 160,
    "training.eval_every": 160,
    "training.checkpoint_every": 160,
    "training.statistics_every": 0,
    "optimizer.warmup_steps": 16,
    "evaluation.batches": 8,
}
SMALL = {"training.steps": 60}

_BASE = 16
_RATES = (0.002, 0.006, 0.018, 0.054)
_PRECISIONS = {"float32": "float32", "ternary": "bitnet_b158"}
_WIDTHS = (16, 64)
_WAYS = ("same rate", "width transfer")


def _model(width: int) -> dict[str, Any]:
    """Every size in proportion; the size of a head, 8, stays."""
    return {
        "model.hidden_size": width,
        "model.ffn_size": 3 * width,
        "model.num_heads": width // 8,
        "model.num_kv_heads": width // 16,
    }


def _name(precision: str, width: int, way: str, rate: float) -> str:
    # At the base width both ways are one model.
    return f"{precision} {width}{'' if width == _BASE else ' ' + way} {rate}"


ARMS = {
    _name(precision, width, way, rate): {
        "model.precision": recipe,
        "optimizer.learning_rate": rate,
        **_model(width),
        **({"optimizer.base_width": _BASE} if way == "width transfer" and width != _BASE else {}),
    }
    for precision, recipe in _PRECISIONS.items()
    for width in _WIDTHS
    for way in _WAYS
    for rate in _RATES
}
BASELINE = _name("float32", _BASE, _WAYS[0], 0.006)
SMALL_ARMS = tuple(arm for arm in ARMS if arm.startswith("ternary") and arm.endswith(("0.006", "0.018")))


def best_rate(losses: Sequence[float]) -> float:
    """log2 of the rate with the lowest loss: the vertex of the parabola through the best of _RATES and its neighbours,
    or the best itself at an end of the range."""
    x, best = np.log2(_RATES), int(np.argmin(losses))
    if best in (0, len(x) - 1):
        return float(x[best])
    a, b, _ = np.polyfit(x[best - 1 : best + 2], losses[best - 1 : best + 2], 2)
    return float(-b / (2 * a))


def _losses(
    rows: Sequence[Mapping[str, Any]], precision: str, width: int, way: str
) -> dict[int, list[float]]:
    """Seed -> losses at _RATES, infinite for a run that diverged; seeds with a run missing are left out."""
    found: dict[int, dict[float, float]] = {}
    for rate in _RATES:
        arm = _name(precision, width, way, rate)
        for row in rows:
            if row["arm"] == arm:
                loss = row[METRIC] if row["status"] == "finished" else float("inf")
                found.setdefault(row["seed"], {})[rate] = loss
    return {seed: [at[rate] for rate in _RATES] for seed, at in found.items() if len(at) == len(_RATES)}


def _curves(rows: Sequence[Mapping[str, Any]], precision: str, way: str) -> dict[int, list[list[float]]]:
    """Seed -> losses [width][rate], for seeds that have all."""
    by_width = [_losses(rows, precision, width, way) for width in _WIDTHS]
    seeds = set.intersection(*map(set, by_width))
    return {seed: [losses[seed] for losses in by_width] for seed in sorted(seeds)}


def slopes(curves: Mapping[int, Sequence[Sequence[float]]]) -> list[float]:
    """Per seed, the exponent p of `best rate ~ width^p`, by least squares over the widths."""
    x = np.log2(_WIDTHS)
    return [float(np.polyfit(x, [best_rate(losses) for losses in one], 1)[0]) for one in curves.values()]


def costs(curves: Mapping[int, Sequence[Sequence[float]]]) -> list[float]:
    """Per seed, the loss of the widest model at the rate that is best for the narrowest, above its own best."""
    return [one[-1][int(np.argmin(one[0]))] - min(one[-1]) for one in curves.values()]


def moves(study: Study, rows: Sequence[Mapping[str, Any]]) -> Section:
    """Best rates by width, their exponent, and what the narrow model's rate costs the widest model."""
    lines = []
    for precision in _PRECISIONS:
        for way in _WAYS:
            curves = _curves(rows, precision, way)
            if curves:
                mean = np.mean(list(curves.values()), axis=0)
                rates = [f"{2 ** best_rate(losses):.4f}" for losses in mean]
                found = (slopes(curves), costs(curves), [min(one[-1]) for one in curves.values()])
                lines.append(
                    [f"{precision}, {way}", *rates, *(str(interval(list(column))) for column in found)]
                )
    header = [
        "model",
        *(f"best rate at {width}" for width in _WIDTHS),
        "exponent p",
        f"cost at {_WIDTHS[-1]}",
        f"best loss at {_WIDTHS[-1]}",
    ]
    note = (
        "Best rates: of the mean losses, by a parabola through the best and its neighbours. p: best rate ~ width^p, "
        "per seed. Cost: held-out loss of the widest model at the best rate of the narrowest, above its best. Mean ± "
        "half of the 95 % Student-t interval over seeds."
    )
    return Section(f"{markdown_table(header, lines)}\n\n{note}")


def _place(arm: str, row: Mapping[str, Any]) -> Point:
    *series, rate = arm.split()
    return Point(float(rate), " ".join(series))


def _against(arm: str) -> str:
    return f"{arm.rsplit(' ', 1)[0]} 0.006"


def _exponent(rows: Sequence[Mapping[str, Any]], precision: str, way: str) -> Estimate | None:
    found = slopes(_curves(rows, precision, way))
    return interval(found) if found else None


CLAIMS = (
    Claim(
        says="float32: the best rate falls with width, exponent below 0",
        measure=lambda study, rows: _exponent(rows, "float32", "same rate"),
        less_than=0,
    ),
    Claim(
        says="float32: it stays with muP",
        measure=lambda study, rows: _exponent(rows, "float32", "width transfer"),
        equivalent=0.25,
    ),
    Claim(
        says="ternary (derived): it falls, exponent -1 to -1/2",
        measure=lambda study, rows: _exponent(rows, "ternary", "same rate"),
        between=(-1.0, -0.5),
    ),
    Claim(
        says="ternary (derived): it stays with the option",
        measure=lambda study, rows: _exponent(rows, "ternary", "width transfer"),
        equivalent=0.25,
    ),
)

REPORT = (
    moves,
    arms_table(against=_against),
    points("rates", _place, xlabel="peak learning rate", xscale="log"),
)
