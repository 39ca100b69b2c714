"""Summarization, scored by ROUGE (Lin 2004) against references, with the first sentence as the baseline.

Each ROUGE score is an F-measure with stemming by the optional package rouge-score, the maximum over an example's
references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.evaluation.intervals import mean
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.result import Result
from bitnet_jax.evaluation.summaries import continued
from bitnet_jax.optional_packages import missing_package

KINDS = ("rouge1", "rouge2", "rougeL")
SUMMARY_BYTES = 240  # maximum length of a summary: about forty English words


def rouge(references: Sequence[Sequence[str]], summaries: Sequence[str]) -> np.ndarray:
    """F-measures in [0, 1], float [N, KINDS], each the maximum over the references of its example."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise DataError(missing_package("rouge-score")) from error
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    rows = []
    for texts, summary in zip(references, summaries, strict=True):
        scores = [scorer.score(text, summary) for text in texts]
        rows.append([max(score[kind].fmeasure for score in scores) for kind in KINDS])
    return np.array(rows)


def summarization(model: TextModel, records: Sequence[dict[str, Any]], *, progress: bool = False) -> Result:
    """ROUGE of greedy summaries of records with `source`, a list of sentences, and `target`, a list of references.

    A source that leaves no room for cue and answer is truncated at the end.
    """
    references = [record["target"] for record in records]
    lead = rouge(references, [record["source"][0] for record in records]).mean(axis=0)
    texts = [" ".join(s.strip() for s in record["source"]) for record in records]
    tokens = sum(map(len, model.tokenizer.encode_batch(texts)))
    bytes_per_token = sum(len(text.encode()) for text in texts) / tokens
    new_tokens = max(1, min(round(SUMMARY_BYTES / bytes_per_token), model.config.max_length // 3))
    summaries, cut = continued(model, texts, new_tokens, progress=progress)
    scores = rouge(references, summaries)
    return Result(
        len(records),
        {kind: mean(scores[:, i]) for i, kind in enumerate(KINDS)},
        {f"{kind}_of_the_first_sentence": float(lead[i]) for i, kind in enumerate(KINDS)},
        {
            "new_tokens": new_tokens,
            "sources_cut": len(cut),
            "first_summary": summaries[0],
        },
    )
