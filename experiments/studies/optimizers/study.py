"""Runs of the study: AdamW, AdamW with moments in bfloat16, and Muon at two rates, in float32 and ternary.

Every run also evaluates a moving average of its weights, which does not change its training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.contrasts import values, welch
from bitnet_experiments.intervals import Estimate, detectable, interval, paired
from bitnet_experiments.sections import Section, arms_table, markdown_table, pairs_table
from bitnet_experiments.study import Study, product

QUESTION = "Do Muon, moments in bfloat16 and an average of the weights suit few-bit models?"
SOURCE = "Muon is Scalable 2502.16982; merged records of OpenAI's Parameter Golf (2026)"
PAPER_EFFECT = (
    "ternary: Muon 0.07 bits per byte below AdamW; an average of the weights much worse than the weights"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"
SEEDS = (0, 1, 2)
COMMON = {
    "data.batch_size": 8,
    "training.steps": 200,
    "training.eval_every": 200,
    "training.checkpoint_every": 200,
    "training.statistics_every": 0,
    "optimizer.warmup_steps": 20,
    "optimizer.ema_decay": 0.98,
    "evaluation.batches": 8,
}
SMALL = {"training.steps": 60}

_PRECISIONS = {"float32": "float32", "ternary": "bitnet_b158"}
_OPTIMIZERS = {
    "AdamW": {},
    "AdamW bfloat16": {"optimizer.moments": "bfloat16"},
    "Muon": {"optimizer.name": "muon"},
}
_RATES = (0.006, 0.018)
ARMS = product(
    {name: {"model.precision": recipe} for name, recipe in _PRECISIONS.items()},
    _OPTIMIZERS,
    {str(rate): {"optimizer.learning_rate": rate} for rate in _RATES},
    join=" ",
)
BASELINE = "float32 AdamW 0.006"
SMALL_ARMS = tuple(arm for arm in ARMS if arm.startswith("ternary"))


def _average(study: Study, rows: Sequence[Mapping[str, Any]], arm: str) -> Estimate | None:
    """The held-out loss of the averaged weights minus that of the weights, paired by run."""
    differences = paired(values(rows, arm, "valid_ema_loss"), values(rows, arm, "valid_loss"))
    return interval(differences) if differences else None


def averages(study: Study, rows: Sequence[Mapping[str, Any]]) -> Section:
    found = {arm: _average(study, rows, arm) for arm in study.arms}
    lines = [[arm, str(one), f"{detectable(one):.4f}"] for arm, one in found.items() if one is not None]
    return Section(markdown_table(["arm", "loss of the average minus loss", "detectable"], lines))


_PAIRS = tuple(
    (f"{precision} {name} {rate}", f"{precision} AdamW {rate}")
    for name in ("AdamW bfloat16", "Muon")
    for precision in _PRECISIONS
    for rate in _RATES
)


def _more_in_ternary(study: Study, rows: Sequence[Mapping[str, Any]]) -> Estimate | None:
    """The harm of the average at 0.018 in ternary minus that in float32; Welch's interval."""
    harm = {}
    for name in _PRECISIONS:
        loss, average = (values(rows, f"{name} AdamW 0.018", metric) for metric in (METRIC, "valid_ema_loss"))
        harm[name] = {seed: average[seed] - loss[seed] for seed in loss if seed in average}
    return welch({"ternary": 1.0, "float32": -1.0}, harm) if all(harm.values()) else None


CLAIMS = (
    Claim(
        says="Muon is better than AdamW in ternary, at the better rate of both",
        contrast=("ternary Muon 0.018", "ternary AdamW 0.018"),
        less_than=0,
    ),
    *(
        Claim(
            says=f"an average of the weights is worse than the weights by 0.12 to 1.07 bits per byte, at {rate}",
            measure=lambda study, rows, rate=rate: _average(study, rows, f"ternary AdamW {rate}"),
            between=(0.083, 0.742),  # nats
        )
        for rate in _RATES
    ),
    Claim(
        says="and by more in ternary than in float32 (0.018)",
        measure=_more_in_ternary,
        greater_than=0,
    ),
    Claim(
        says="moments in bfloat16 are harmless",
        contrast=("ternary AdamW bfloat16 0.018", "ternary AdamW 0.018"),
        equivalent=0.02,
    ),
)

REPORT = (arms_table("valid_ema_loss"), pairs_table(*_PAIRS), averages)
