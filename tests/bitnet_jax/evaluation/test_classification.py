"""Classification metrics against their definitions, and classifiers against a forward pass per text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.data import ByteTokenizer, DataError
from bitnet_jax.evaluation import classification as module
from bitnet_jax.evaluation.classification import classification, f1, macro_f1, matthews, predict_classes
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.models import ModelConfig, Transformer

CLASSIFIER = ModelConfig(
    vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, max_length=40, num_classes=3,
    causal=False, precision="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def classifier() -> TextModel:
    params = jax.jit(Transformer(CLASSIFIER).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, params)
    return TextModel(CLASSIFIER, {"params": params}, ByteTokenizer())


def test_f1_matches_a_hand_computed_value() -> None:
    labels, predictions = np.array([1, 1, 1, 0, 0, 2]), np.array([1, 1, 0, 1, 0, 0])
    assert f1(labels, predictions) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert macro_f1(labels, predictions) == pytest.approx((f1(labels, predictions) + 2 / 5 + 0) / 3)
    assert f1(labels, predictions, positive=7) == 0


def test_matthews_is_the_binary_correlation_and_its_multiclass_generalization() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 300)
    predictions = np.where(random.random(300) < 0.7, labels, 1 - labels)
    assert matthews(labels, predictions) == pytest.approx(np.corrcoef(labels, predictions)[0, 1])
    # For several classes: the correlation of indicator vectors, summed over classes (Gorodkin 2004).
    labels, predictions = random.integers(0, 5, 400), random.integers(0, 5, 400)
    predictions[:200] = labels[:200]
    x, y = (np.eye(5)[values] - np.eye(5)[values].mean(axis=0) for values in (labels, predictions))
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert matthews(labels, predictions) == pytest.approx(expected)
    assert matthews(labels, labels) == pytest.approx(1)
    assert matthews(labels, np.zeros(400, int)) == 0


def test_a_classifier_predicts_with_its_head(classifier: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 80)
    texts = [
        "a",
        "bcd" * 11,
        "ef",
        "gh" * 30,
        "i",
        "jklmn",
    ]  # two widths, a padded batch, one truncated text
    forward = jax.jit(Transformer(CLASSIFIER).apply)  # far faster to compile than operation by operation
    alone = []
    for text in texts:
        tokens = jnp.asarray(ByteTokenizer().encode(text)[:40])[None]
        alone.append(int(jnp.argmax(forward(classifier.variables, tokens).logits)))
    assert len(set(alone)) > 1, "a constant classifier would make this test vacuous"
    assert predict_classes(classifier, texts, 3).tolist() == alone

    labels = ["c", "a", "b", "a", "c", "b"]
    records = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    result = classification(classifier, records, template="{text}:")
    expected = np.mean(["abc"[i] == label for i, label in zip(alone, labels, strict=True)])
    assert result.metrics["acc"].value == pytest.approx(expected)
    assert "acc_norm" not in result.metrics
    assert result.details["classes"] == ["a", "b", "c"]
    assert result.baselines == {"acc_of_the_largest_class": pytest.approx(1 / 3)}


def test_a_language_model_predicts_the_most_likely_label_word(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def choose(model: TextModel, items: list, *, progress: bool) -> tuple[np.ndarray, np.ndarray]:
        seen.extend(items)
        return np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1])

    monkeypatch.setattr(module, "choose", choose)
    config = dataclasses.replace(CLASSIFIER, num_classes=0, causal=True)
    model = TextModel(config, {}, ByteTokenizer())
    records = [{"text": f"t{i}", "label": label} for i, label in enumerate((0, 0, 1, 1))]
    words = {0: "no", 1: "yes"}
    result = classification(model, records, template="{text}?", words=words, metrics=("f1", "matthews"))
    assert seen[2].pairs == (("t2?", " no"), ("t2?", " yes"))
    assert [item.label for item in seen] == [0, 0, 1, 1]
    assert result.metrics["acc"].value == 0.75
    assert result.metrics["acc_norm"].value == 1
    assert result.metrics["f1"].value == pytest.approx(0.8)
    assert result.metrics["matthews"].value == pytest.approx(1 / np.sqrt(3))
    assert result.details["predicted_shares"] == [0.25, 0.75]


def test_invalid_classification_tasks_are_rejected(classifier: TextModel) -> None:
    records = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    with pytest.raises(DataError, match="got a head of 3 classes for 2 labels"):
        classification(classifier, records, template="{text}")
    with pytest.raises(DataError, match=r"got the labels \[1\], expected at least two of \['0', '2'\]"):
        classification(classifier, records, template="{text}", words={0: "no", 2: "yes"})
    with pytest.raises(DataError, match=r"got the labels \[0\], expected at least two"):
        classification(classifier, records[:1], template="{text}")
    with pytest.raises(DataError, match="got the text '', expected at least one token"):
        predict_classes(classifier, ["a", ""], 3)
