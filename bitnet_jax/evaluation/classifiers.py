"""Scores of a classifier on labelled examples, as used for the evaluation during training."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax.data.batches import whole_batches
from bitnet_jax.data.errors import DataError
from bitnet_jax.evaluation.classification import Metric, f1, macro_f1, matthews, on_subset
from bitnet_jax.evaluation.intervals import bootstrap, proportion
from bitnet_jax.evaluation.language import token_nats
from bitnet_jax.evaluation.result import Result
from bitnet_jax.inference.programs import PROGRAMS
from bitnet_jax.models import Architecture
from bitnet_jax.nn.placement import whole


@dataclass(frozen=True, eq=False)
class ClassificationScore:
    nats: float  # sum of -ln P(class)
    labels: np.ndarray  # int [N]
    predictions: np.ndarray  # int [N]

    def summary(self) -> dict[str, float]:
        """Means over the examples; `f1` is that of class 1 with two classes, else the mean over classes."""
        accuracy = float(np.mean(self.labels == self.predictions))
        return {
            "loss": self.nats / len(self.labels),
            "accuracy": accuracy,
            "error": 100 * (1 - accuracy),  # percent
            "f1": self._f1(self.labels, self.predictions),
            "matthews": matthews(self.labels, self.predictions),
        }

    @property
    def _f1(self) -> Metric:
        two = max(self.labels.max(), self.predictions.max()) < 2
        return f1 if two else macro_f1

    def result(self) -> Result:
        """accuracy, f1 and matthews with their intervals; details: loss in nats per example."""
        count, labels, predictions = len(self.labels), self.labels, self.predictions
        metrics = {"accuracy": proportion(int((labels == predictions).sum()), count)}
        for name, metric in (("f1", self._f1), ("matthews", matthews)):
            metrics[name] = bootstrap(functools.partial(on_subset, metric, labels, predictions), count)
        largest = {"accuracy_of_the_largest_class": float(np.bincount(labels).max() / count)}
        return Result(count, metrics, largest, {"loss": self.nats / count})


def _measure(
    config: Architecture, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> tuple[Float[Array, ""], Int[Array, "B"]]:
    mask: dict[str, Any] = {"mask": batch["mask"]} if "mask" in batch else {}
    output: Any = config.module().apply(variables, batch["inputs"], **mask)
    logits, weights = output.logits, batch["weights"]
    nats = jnp.sum(weights * token_nats(logits, batch["targets"]))
    return whole(nats), whole(jnp.argmax(logits, axis=-1))


def score_classifier(
    config: Architecture, variables: Mapping[str, Any], batches: Iterable[Mapping[str, np.ndarray]]
) -> ClassificationScore:
    """Score a latent or packed model in its deterministic form.

    Args:
      batches: {"inputs", "targets" int32 [B], "weights" float32 [B], 0 for padding, and for texts "mask"}, as made
        by `whole_batches`.

    Raises:
      DataError: no examples.
    """
    nats, labels, predictions = 0.0, [], []
    for batch in batches:
        shapes = tuple((name, array.shape) for name, array in batch.items())
        loss, predicted = PROGRAMS.of(_measure, config, shapes=shapes)(variables, dict(batch))
        real = batch["weights"] > 0
        nats += float(loss)
        labels.append(batch["targets"][real])
        predictions.append(np.asarray(predicted)[real])
    if not sum(map(len, labels)):
        raise DataError("got no examples to score a classifier on, expected at least one")
    return ClassificationScore(nats, np.concatenate(labels), np.concatenate(predictions))


def _probabilities(
    config: Architecture, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> Float[Array, "B C"]:
    mask: dict[str, Any] = {"mask": batch["mask"]} if "mask" in batch else {}
    output: Any = config.module().apply(variables, batch["inputs"], **mask)
    return jax.nn.softmax(output.logits, axis=-1)


def probabilities(
    config: Architecture, variables: Mapping[str, Any], examples: Mapping[str, np.ndarray], batch_size: int
) -> np.ndarray:
    """P(class) of each example, float32 [N, C], by a latent or packed model in its deterministic form.

    Args:
      examples: "inputs" and, for texts, "mask".
    """
    rows = []
    for batch in whole_batches(examples, batch_size):
        weights = batch.pop("weights")
        shapes = tuple((name, array.shape) for name, array in batch.items())
        program = PROGRAMS.of(_probabilities, config, shapes=shapes)
        rows.append(np.asarray(program(variables, batch))[weights > 0])
    return np.concatenate(rows)
