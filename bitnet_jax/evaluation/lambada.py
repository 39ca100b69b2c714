"""LAMBADA (1606.06031): predicting the last word of a passage, which depends on the whole passage.

acc   share of passages whose last word is the greedy prediction, token by token
ppl   exp(-mean ln P(last word | passage)), per word regardless of its number of tokens
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.evaluation.intervals import Estimate, mean, proportion
from bitnet_jax.evaluation.likelihood import TextModel, score_texts
from bitnet_jax.evaluation.result import Result


def last_word(model: TextModel, records: Iterable[dict[str, Any]], *, progress: bool = False) -> Result:
    """acc and ppl of the last word of each record's `text`."""
    scores = score_texts(model, [_cut(record["text"]) for record in records], progress=progress)
    nats = mean(-np.array([score.log_probability for score in scores]))
    hits = sum(score.greedy for score in scores)
    with np.errstate(over="ignore"):
        perplexity = Estimate(*(float(value) for value in np.exp(nats)))
    return Result(len(scores), {"acc": proportion(hits, len(scores)), "ppl": perplexity})


def _cut(text: str) -> tuple[str, str]:
    """(passage, " word")."""
    passage, blank, word = text.rstrip().rpartition(" ")
    if not blank or not passage.strip():
        raise DataError(f"got the passage {text[:80]!r}, expected at least two words")
    return passage, f" {word}"
