"""How well a classifier does on labelled examples: loss, accuracy, F1, Matthews correlation.

All but the loss are ratios of the confusion matrix, whose entry [i, j] counts examples of class i that were taken
for class j.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax.data.errors import DataError
from bitnet_jax.evaluation.language import token_nats
from bitnet_jax.models import Architecture, build_model


@dataclass(frozen=True, eq=False)
class ClassificationScore:
    nats: float  # sum of -ln P(class)
    confusion: np.ndarray  # int64 [C, C], rows: true classes

    @property
    def loss(self) -> float:
        """Nats per example."""
        return self.nats / int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: of class 1 where there are two classes, else the mean over classes.

        A class that never occurs and is never given counts 0.
        """
        hits = np.diag(self.confusion)
        both = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        scores = 2 * hits / np.maximum(both, 1)
        return float(scores[1] if len(scores) == 2 else scores.mean())

    @property
    def matthews(self) -> float:
        """Correlation of true and given classes (R_K of Gorodkin 2004); 0 where either is always the same."""
        count = float(self.confusion.sum())
        true, given = (self.confusion.sum(axis=axis).astype(np.float64) for axis in (1, 0))
        covariance = np.trace(self.confusion) * count - true @ given
        spread = math.sqrt(count**2 - given @ given) * math.sqrt(count**2 - true @ true)
        return float(covariance / spread) if spread else 0.0

    def summary(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "error": 100 * (1 - self.accuracy),  # per cent
            "f1": self.f1,
            "matthews": self.matthews,
        }


@functools.partial(jax.jit, static_argnums=0)
def _measure(
    config: Architecture, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> tuple[Float[Array, ""], Int[Array, "C C"]]:
    mask: dict[str, Any] = {"mask": batch["mask"]} if "mask" in batch else {}
    output: Any = build_model(config).apply(variables, batch["inputs"], **mask)
    logits, targets, weights = output.logits, batch["targets"], batch["weights"]
    classes = logits.shape[-1]
    given = jnp.argmax(logits, axis=-1)
    confusion = jnp.zeros((classes, classes), jnp.int32).at[targets, given].add(weights.astype(jnp.int32))
    return jnp.sum(weights * token_nats(logits, targets)), confusion


def score_classifier(
    config: Architecture, variables: Mapping[str, Any], batches: Iterable[Mapping[str, np.ndarray]]
) -> ClassificationScore:
    """Score a model, latent or packed, in its deterministic form.

    Args:
      batches: {"inputs", "targets" int32 [B], "weights" float32 [B], 0 for what only fills up, and for texts
        "mask"}, as `whole_batches` makes them.

    Raises:
      DataError: no examples.
    """
    nats, confusion = 0.0, None
    for batch in batches:
        loss, counts = _measure(config, variables, dict(batch))
        nats += float(loss)
        confusion = np.asarray(counts, np.int64) + (0 if confusion is None else confusion)
    if confusion is None or not confusion.sum():
        raise DataError("got no examples to score a classifier on, expected at least one")
    return ClassificationScore(nats, confusion)
