"""Text classification by a classifier, or by the likelihood that a language model assigns to each label.

F1 and the Matthews correlation are functions of labels and predictions, int [N].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax.data.errors import DataError
from bitnet_jax.evaluation.batching import BATCH_TOKENS, batches
from bitnet_jax.evaluation.intervals import bootstrap, proportion
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.multiple_choice import choose, question_item
from bitnet_jax.evaluation.result import Result
from bitnet_jax.inference.buckets import padded_rows
from bitnet_jax.inference.limits import check_tokens, warn_of_unknown_tokens
from bitnet_jax.inference.programs import PROGRAMS
from bitnet_jax.models import ModelConfig, Transformer

Metric = Callable[[np.ndarray, np.ndarray], float]


def f1(labels: np.ndarray, predictions: np.ndarray, positive: int = 1) -> float:
    """2 TP / (2 TP + FP + FN) of one class; 0 if the class is neither present nor predicted."""
    hits = int(((labels == positive) & (predictions == positive)).sum())
    both = int((labels == positive).sum() + (predictions == positive).sum())
    return 2 * hits / both if both else 0.0


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean of `f1` over the classes that are present or predicted."""
    classes = np.union1d(labels, predictions)
    return float(np.mean([f1(labels, predictions, int(c)) for c in classes]))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation, for any number of classes (Gorodkin 2004); 0 if labels or predictions are constant.

    (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2)), with c correct of s samples, t_k samples
    of class k, p_k predicted as k.
    """
    count = max(int(labels.max()), int(predictions.max())) + 1
    true, predicted = (np.bincount(x, minlength=count).astype(float) for x in (labels, predictions))
    samples, correct = len(labels), float((labels == predictions).sum())
    spread = (samples**2 - predicted @ predicted) * (samples**2 - true @ true)
    return float((correct * samples - true @ predicted) / np.sqrt(spread)) if spread > 0 else 0.0


METRICS: dict[str, Metric] = {"f1": f1, "macro_f1": macro_f1, "matthews": matthews}


def classification(
    model: TextModel,
    records: Sequence[dict[str, Any]],
    *,
    template: str,
    words: Mapping[int | str, str] | None = None,
    metrics: Sequence[str] = ("macro_f1", "matthews"),
    progress: bool = False,
) -> Result:
    """acc and other METRICS of records with `text` and `label`.

    A classifier predicts with its head, whose classes are the sorted labels. A language model predicts the label
    whose word is most likely after the template; acc_norm normalises by the bytes of the word.

    Args:
      words: label -> its word, in the order of classes; None: the sorted labels of the records, with spaces for
        underscores.

    Raises:
      DataError: fewer than two labels, a label without a word, or a head with another number of classes.
    """
    found = sorted({record["label"] for record in records}, key=str)
    words = {label: str(label).replace("_", " ") for label in found} if words is None else words
    unknown = [label for label in found if label not in words]
    if len(words) < 2 or unknown:
        raise DataError(
            f"got the labels {unknown or found}, expected at least two of {sorted(map(str, words))}"
        )
    classes = {label: i for i, label in enumerate(words)}
    labels = np.array([classes[record["label"]] for record in records])
    choices = [{"choices": list(words.values()), "label": int(label)} for label in labels]
    if model.config.num_classes:
        plain = predict_classes(model, [record["text"] for record in records], len(words), progress=progress)
        normalised = None
    else:
        items = [question_item(template, r | c) for r, c in zip(records, choices, strict=True)]
        plain, normalised = choose(model, items, progress=progress)
    figures = {"acc": proportion(int((plain == labels).sum()), len(labels))}
    if normalised is not None:
        figures["acc_norm"] = proportion(int((normalised == labels).sum()), len(labels))
    for name in metrics:
        figures[name] = bootstrap(functools.partial(on_subset, METRICS[name], labels, plain), len(labels))
    shares = np.bincount(labels, minlength=len(words)) / len(labels)
    predicted = np.bincount(plain, minlength=len(words)) / len(labels)
    details = {"classes": [str(label) for label in words], "predicted_shares": predicted.tolist()}
    return Result(len(labels), figures, {"acc_of_the_largest_class": float(shares.max())}, details)


def on_subset(metric: Metric, labels: np.ndarray, predictions: np.ndarray, indices: np.ndarray) -> float:
    return metric(labels[indices], predictions[indices])


def predict_classes(
    model: TextModel, texts: Sequence[str], classes: int, *, progress: bool = False
) -> np.ndarray:
    """The most likely class of each text, int [N], by a classifier; texts are truncated to its max_length."""
    config = model.config
    if config.num_classes != classes:
        raise DataError(
            f"got a head of {config.num_classes} classes for {classes} labels, expected equal numbers"
        )
    rows = [model.tokenizer.encode(text)[: config.max_length] for text in texts]
    sizes, predictions = np.array([len(row) for row in rows]), np.zeros(len(rows), int)
    if not sizes.all():
        raise DataError(f"got the text {texts[int(np.argmin(sizes))]!r}, expected at least one token")
    warn_of_unknown_tokens(config, model.tokenizer)
    for number, ids in enumerate(rows):
        check_tokens(config, model.tokenizer, ids, f"text {number}")
    for indices, batch_rows, width in batches(
        sizes, config.max_length, lambda width: BATCH_TOKENS // width, progress=progress
    ):
        tokens, mask = padded_rows([rows[i] for i in indices], batch_rows, width)
        program = PROGRAMS.of(_class_logits, config, shapes=tokens.shape)
        logits = program(model.variables, tokens, mask)
        predictions[indices] = np.asarray(logits)[: len(indices)].argmax(axis=-1)
    return predictions


def _class_logits(
    config: ModelConfig, variables: Any, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B C"]:
    output: Any = Transformer(config).apply(variables, tokens, mask=mask)
    return output.logits
