"""Cross entropy against NumPy in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.training import losses

LOGITS = np.random.default_rng(0).normal(0, 3, (2, 5, 7)).astype(np.float32)
TARGETS = np.random.default_rng(1).integers(0, 7, (2, 5)).astype(np.int32)
WEIGHTS = np.array([[1, 0, 2, 0.5, 0], [0, 0, 1, 1, 3]], np.float32)
CLOSE = 1e-6  # a logsumexp of 7 terms in float32 against float64


def cross_entropy_sums(*arrays: Any, **options: Any) -> losses.LossSums:
    return losses.cross_entropy_sums(*map(jnp.asarray, arrays), **options)


def cross_entropy(*arguments: Any, **options: Any) -> jax.Array:
    """The weighted mean."""
    sums = cross_entropy_sums(*arguments, **options)
    return sums.loss / sums.weight


def expected_loss(weights: np.ndarray, z_loss: float = 0.0) -> float:
    logits = LOGITS.astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    return float((weights * (log_z - picked + z_loss * log_z**2)).sum() / weights.sum())


def test_mean_over_weights_and_z_loss() -> None:
    ones = np.ones_like(WEIGHTS)
    assert float(cross_entropy(LOGITS, TARGETS)) == pytest.approx(expected_loss(ones), rel=CLOSE)
    assert float(cross_entropy(LOGITS, TARGETS, WEIGHTS)) == pytest.approx(expected_loss(WEIGHTS), rel=CLOSE)
    z = float(cross_entropy(LOGITS, TARGETS, WEIGHTS, z_loss=1e-2))
    assert z == pytest.approx(expected_loss(WEIGHTS, 1e-2), rel=CLOSE)


def test_padding_with_weight_zero_has_no_effect_and_no_gradient() -> None:
    changed = LOGITS.copy()
    changed[WEIGHTS == 0] = 1e4
    assert cross_entropy(changed, TARGETS, WEIGHTS) == cross_entropy(LOGITS, TARGETS, WEIGHTS)
    gradient = np.asarray(jax.grad(lambda x: cross_entropy(x, TARGETS, WEIGHTS))(LOGITS))
    assert (gradient[WEIGHTS == 0] == 0).all()
    assert (gradient[WEIGHTS > 0] != 0).any(-1).all()


def test_gradient_is_softmax_minus_one_hot() -> None:
    gradient = jax.grad(lambda x: cross_entropy_sums(x, TARGETS).loss)(LOGITS)
    exponentials = np.exp(LOGITS.astype(np.float64))
    expected = exponentials / exponentials.sum(-1, keepdims=True) - np.eye(7)[TARGETS]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)  # probabilities in float32


def test_sums_of_two_halves_add_up_to_the_sums_of_the_whole() -> None:
    whole = cross_entropy_sums(LOGITS, TARGETS, WEIGHTS)
    halves = [cross_entropy_sums(LOGITS[i], TARGETS[i], WEIGHTS[i]) for i in range(2)]
    for name in whole._fields:
        total = sum(float(getattr(half, name)) for half in halves)
        assert float(getattr(whole, name)) == pytest.approx(total, rel=CLOSE)


def test_accuracy_is_weighted() -> None:
    logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 5.0]])
    targets = jnp.array([0, 2, 2])  # hit, miss (the first of two equal logits counts), hit
    assert float(cross_entropy_sums(logits, targets).correct) == 2
    weighted = cross_entropy_sums(logits, targets, jnp.array([1.0, 2.0, 1.0]))
    assert (float(weighted.correct), float(weighted.weight)) == (2, 4)


def test_classification_and_half_precision_logits() -> None:
    logits = jnp.array([[60.0, 0.0], [0.0, 60.0]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.array([0, 0]))
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(30.0)


def test_zero_total_weight_gives_nan_and_not_zero() -> None:
    assert np.isnan(cross_entropy(LOGITS, TARGETS, jnp.zeros((2, 5))))
