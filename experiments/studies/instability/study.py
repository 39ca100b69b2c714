"""Runs of the study: a learning rate that is far too high, and what keeps small binary and ternary models alive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_experiments import runs
from bitnet_experiments.claims import Claim
from bitnet_experiments.intervals import Range, proportions
from bitnet_experiments.sections import Section, curves, markdown_table
from bitnet_experiments.study import Row, Study, product, read_study
from bitnet_jax.data import load_corpus
from bitnet_jax.evaluation.ngram import ngram_counts, ngram_nats
from bitnet_jax.training.metrics import read_metrics
from bitnet_jax.training.run_folder import RunFolder

QUESTION = "Which remedy keeps a 1-bit model from diverging at a learning rate that is far too high?"
SOURCE = "Wortsman et al. 2309.14322 (QK-norm, z-loss), PaLM 2204.02311, section 5.1 (returns), float models"
PAPER_EFFECT = (
    "QK-norm and z-loss train at rates at which models without them diverge; a return passes a spike"
)
SOURCE_TASK, TASK = "language modelling", "language modelling"

CONFIG = "study_lm"
METRIC = "valid_loss"  # nats per byte
BASELINE = "ternary, nothing"
SEEDS = (0, 1, 2)

# No sub-norm, no warm-up, no clipping, a constant rate: nothing holds the model but the remedy.
COMMON = {
    "model.vocab_size": 256,
    "model.norm_placement": "pre",
    "data.tokenizer": "byte",
    "data.batch_size": 8,
    "optimizer.learning_rate": 0.5,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": None,
    "training.steps": 300,
    "training.eval_every": 100,
    "training.checkpoint_every": 20,
    "evaluation.batches": 20,
}
ARMS = product(
    {
        "ternary": {"model.precision": "bitnet_b158"},
        "binary": {"model.precision": "bitnet"},
    },
    {
        "nothing": {},
        "QK-norm": {"model.qk_norm": True},
        "z-loss": {"training.z_loss": 1e-4},  # the weight of PaLM and of 2309.14322
        "clipping": {"optimizer.clip_norm": 1.0},
        "return": {
            "training.spike_factor": 10.0,
            "training.spike_window": 20,
            "training.max_loss": 6.0,  # before the window is full: worse than guessing, ln 256 = 5.55
            "training.max_returns": 10,
        },
        "lower rate": {"optimizer.learning_rate": 0.01},
    },
    join=", ",
)


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    """Fields of the trained run, the loss of a model that knows only how frequent bytes are, and the worst updates."""
    config = read_study(Path(__file__).parent).settings(arm, seed, small)
    folder = workdir / f"{arm}-seed{seed}"
    row = runs.train(config, folder)
    losses = [float(r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    data = config.data
    corpus = load_corpus(
        data.source,
        tokenizer=data.tokenizer,
        split=data.split,
        valid_fraction=data.valid_fraction,
        root=data.root,
    )
    unigram = float(ngram_nats(ngram_counts(corpus.train, 1), corpus.valid).mean())
    spikes = sum(loss > losses[0] for loss in losses[1:])
    return row | {
        "unigram_loss": unigram,
        "returns": (RunFolder(folder).read_result() or {}).get("returns", []),
        "worst_loss": max(losses),
        "updates_above_first_loss": spikes,
        "failed_to_learn": row["status"] != "finished" or not row["valid_loss"] < unigram,
    }


def outcomes(study: Study, rows: Sequence[Row]) -> Section:
    """Seeds that failed by the rule of the README, and what their losses were."""
    lines = []
    for arm in study.arms:
        found = [row for row in rows if row["arm"] == arm and row["status"] in ("finished", "diverged")]
        if not found:
            continue
        losses = [row["valid_loss"] for row in found if row["status"] == "finished"]
        lines.append(
            [
                arm,
                f"{sum(row['failed_to_learn'] for row in found)} of {len(found)}",
                f"{sum(row['status'] == 'diverged' for row in found)}",
                ", ".join(f"{loss:.2f}" for loss in losses),
                f"{np.median([row['worst_loss'] for row in found]):.1f}",
                f"{np.median([row['updates_above_first_loss'] for row in found]):.0f}",
                f"{np.median([len(row.get('returns', ())) for row in found]):.0f}",
            ]
        )
    header = [
        "arm",
        "failed",
        "ended as diverged",
        "held-out loss by seed",
        "worst update",
        "updates above first",
    ]
    unigram = ", ".join(sorted({f"{row['unigram_loss']:.3f}" for row in rows if "unigram_loss" in row}))
    note = f"Byte frequencies alone: {unigram} nats per byte. Worst update, updates and returns: medians over seeds."
    return Section(f"{markdown_table([*header, 'returns'], lines)}\n\n{note}")


def EFFECT(study: Study, rows: Sequence[Row]) -> str:
    def failed(kind: str) -> str:
        found = [
            row["failed_to_learn"] for row in rows if row["arm"].endswith(kind) and "failed_to_learn" in row
        ]
        return f"{kind}: {sum(found)} of {len(found)} failed"

    return "; ".join(failed(kind) for kind in ("nothing", "QK-norm", "z-loss", "clipping", "return"))


def prevented(study: Study, rows: Sequence[Row]) -> Range | None:
    """Share of failed runs with the better of QK-norm and z-loss, minus that without a remedy, over both weights."""

    def failed(kind: str) -> tuple[int, int]:
        found = [
            row["failed_to_learn"] for row in rows if row["arm"].endswith(kind) and "failed_to_learn" in row
        ]
        return sum(found), len(found)

    without, *remedies = (failed(kind) for kind in ("nothing", "QK-norm", "z-loss"))
    if not all(count for _, count in (without, *remedies)):
        return None
    return proportions(*min(remedies), *without)


CLAIMS = (
    Claim(
        says="QK-norm or z-loss trains where models without them diverge: failed runs, better of both",
        measure=prevented,
        less_than=0,
    ),
)

REPORT = (outcomes, curves())
