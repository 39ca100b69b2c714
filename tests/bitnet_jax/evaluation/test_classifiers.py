"""Scores of classifiers: against their definitions, and computed on a model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.data import DataError, whole_batches
from bitnet_jax.evaluation.classifiers import ClassificationScore, score_classifier
from bitnet_jax.models import BinaryMLP, BinaryMLPConfig


def test_scores_of_two_classes() -> None:
    labels, predictions = np.repeat([0, 0, 1, 1], [50, 10, 5, 35]), np.repeat([0, 1, 0, 1], [50, 10, 5, 35])
    found = ClassificationScore(10.0, labels, predictions).summary()
    precision, recall = 35 / 45, 35 / 40
    assert found["accuracy"] == pytest.approx(0.85)
    assert found["error"] == pytest.approx(15)
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["matthews"] == pytest.approx((50 * 35 - 10 * 5) / np.sqrt(45 * 40 * 60 * 55))
    assert found["loss"] == pytest.approx(0.1)


def test_multiclass_matthews_is_the_correlation_of_indicators() -> None:
    true, given = np.random.default_rng(0).integers(0, 4, (2, 90))
    x, y = np.eye(4)[true], np.eye(4)[given]
    covariance = [np.mean((a - a.mean(0)) * (b - b.mean(0))) for a, b in ((x, y), (x, x), (y, y))]
    found = ClassificationScore(1.0, true, given).summary()
    assert found["matthews"] == pytest.approx(covariance[0] / np.sqrt(covariance[1] * covariance[2]))
    f1 = [2 * np.sum((true == c) & (given == c)) / (np.sum(true == c) + np.sum(given == c)) for c in range(4)]
    assert found["f1"] == pytest.approx(np.mean(f1))


def test_batched_scores_equal_scores_of_all_examples_at_once() -> None:
    config = BinaryMLPConfig(image_size=4, num_classes=3, hidden_size=16, num_layers=1)
    rng = np.random.default_rng(0)
    examples = {
        "inputs": rng.normal(size=(23, 4, 4, 1)).astype(np.float32),
        "targets": rng.integers(0, 3, 23).astype(np.int32),
    }
    model = BinaryMLP(config)
    variables = model.init(jax.random.key(0), examples["inputs"])
    found = score_classifier(config, variables, whole_batches(examples, 5))
    output: Any = model.apply(variables, examples["inputs"])
    log_p = np.asarray(jax.nn.log_softmax(output.logits))
    assert found.nats == pytest.approx(-log_p[np.arange(23), examples["targets"]].sum(), rel=1e-5)
    np.testing.assert_array_equal(found.labels, examples["targets"])
    np.testing.assert_array_equal(found.predictions, log_p.argmax(1))
    with pytest.raises(DataError, match="got no examples"):
        score_classifier(config, variables, [])
