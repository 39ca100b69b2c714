"""Minimal pairs (BLiMP, 1912.00582): the good sentence must be more likely than the bad one.

accuracy is the unweighted mean over paradigms, as in the paper: paradigms count equally, however many pairs they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_jax.evaluation.intervals import mean_of_proportions
from bitnet_jax.evaluation.likelihood import TextModel, score_texts
from bitnet_jax.evaluation.result import Result


def minimal_pairs(model: TextModel, records: Sequence[dict[str, Any]], *, progress: bool = False) -> Result:
    """Accuracy on records with `paradigm`, `term`, `good` and `bad`; equal likelihoods count as wrong."""
    sentences = [("", record[kind]) for record in records for kind in ("good", "bad")]
    values = np.array([score.log_probability for score in score_texts(model, sentences, progress=progress)])
    right = values[0::2] > values[1::2]
    paradigms = {record["paradigm"]: record["term"] for record in records}
    of = np.array([record["paradigm"] for record in records])
    successes = np.array([right[of == paradigm].sum() for paradigm in paradigms])
    counts = np.array([(of == paradigm).sum() for paradigm in paradigms])
    shares = dict(zip(paradigms, (successes / counts).tolist(), strict=True))
    terms = {
        term: float(np.mean([share for paradigm, share in shares.items() if paradigms[paradigm] == term]))
        for term in dict.fromkeys(paradigms.values())
    }
    return Result(
        len(records),
        {"acc": mean_of_proportions(successes, counts)},
        {"acc": 0.5},
        {"acc_by_term": terms, "acc_by_paradigm": shares},
    )
