"""Multiple choice by likelihood: the answer is the most likely choice after the question.

    acc        argmax_c ln P(choice c | question)
    acc_norm   argmax_c ln P(choice c | question) / bytes of choice c

UTF-8 bytes rather than tokens, so that models with different vocabularies are comparable; lm-evaluation-harness
divides by characters, which is the same for ASCII. Ties go to the first choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.evaluation.intervals import proportion
from bitnet_jax.evaluation.likelihood import TextModel, score_texts
from bitnet_jax.evaluation.result import Result

BLANK = "_"  # of WinoGrande


class Item(NamedTuple):
    """One question: a pair (context, continuation) and a length in bytes per choice, and the index of the answer."""

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    label: int


def question_item(template: str, record: dict[str, Any]) -> Item:
    """Every choice after the same context, the template filled with the record's fields."""
    context = template.format_map(record)
    choices = record["choices"]
    pairs = tuple((context, f" {choice}") for choice in choices)
    return Item(pairs, tuple(max(1, len(choice.encode())) for choice in choices), _label(record))


def blank_item(record: dict[str, Any]) -> Item:
    """Partial scoring (Trinh and Le, 1806.02847): the choice fills the blank, the text after it is scored.

    The continuation is the same for all choices, so lengths do not matter.
    """
    before, blank, after = record["question"].partition(BLANK)
    if not blank or not after.strip():
        raise DataError(
            f"got the question {record['question'][:80]!r}, expected text after a blank {BLANK!r}"
        )
    pairs = tuple((before + choice, f" {after.strip()}") for choice in record["choices"])
    return Item(pairs, (1,) * len(pairs), _label(record))


def _label(record: dict[str, Any]) -> int:
    label, count = record["label"], len(record["choices"])
    if count < 2 or not 0 <= label < count:
        raise DataError(
            f"got label {label} for {count} choices {record['choices']!r:.80}, expected at least two choices and "
            "the index of one"
        )
    return label


def choose(
    model: TextModel, items: Sequence[Item], *, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The chosen index of each item, int [N]: by log-likelihood, and by log-likelihood per byte."""
    pairs = [pair for item in items for pair in item.pairs]
    scores = iter(score_texts(model, pairs, progress=progress))
    plain, normalised = [], []
    for item in items:
        values = np.array([next(scores).log_probability for _ in item.pairs])
        plain.append(int(np.argmax(values)))
        normalised.append(int(np.argmax(values / item.lengths)))
    return np.array(plain), np.array(normalised)


def multiple_choice(
    model: TextModel, records: Iterable[dict[str, Any]], *, template: str, progress: bool = False
) -> Result:
    """acc and acc_norm of records with the fields of the template, `choices` and `label`."""
    items = [question_item(template, record) for record in records]
    plain, normalised = choose(model, items, progress=progress)
    labels = np.array([item.label for item in items])
    return Result(
        len(items),
        {
            "acc": proportion(int((plain == labels).sum()), len(items)),
            "acc_norm": proportion(int((normalised == labels).sum()), len(items)),
        },
        _chance(items),
    )


def fill_in(model: TextModel, records: Iterable[dict[str, Any]], *, progress: bool = False) -> Result:
    """acc of WinoGrande's records (`question` with a blank, `choices`, `label`) by partial scoring."""
    items = [blank_item(record) for record in records]
    plain, _ = choose(model, items, progress=progress)
    right = sum(int(choice == item.label) for choice, item in zip(plain, items, strict=True))
    return Result(len(items), {"acc": proportion(right, len(items))}, _chance(items))


def _chance(items: Sequence[Item]) -> dict[str, float]:
    return {"acc": float(np.mean([1 / len(item.pairs) for item in items]))}
