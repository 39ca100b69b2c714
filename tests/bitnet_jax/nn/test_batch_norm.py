"""Batch norm: its formula and its running statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.nn.batch_norm import BatchNorm

X = jnp.asarray(np.random.default_rng(0).normal(2, 3, (4, 5, 6)), jnp.float32)
NORM = BatchNorm()


def variables() -> dict[str, Any]:
    made = NORM.init(jax.random.key(0), X, deterministic=False)
    params = {"scale": np.linspace(-1, 2, 6, dtype=np.float32), "bias": np.arange(6, dtype=np.float32)}
    return {"params": params, "batch_stats": made["batch_stats"]}


def formula(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    params = variables()["params"]
    return (np.asarray(X) - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def test_training_uses_batch_statistics_and_updates_the_running_ones() -> None:
    y, updated = NORM.apply(variables(), X, deterministic=False, mutable=["batch_stats"])
    mean, var = np.mean(np.asarray(X), axis=(0, 1)), np.var(np.asarray(X), axis=(0, 1))
    # float32 against float32 in a different order
    np.testing.assert_allclose(y, formula(mean, var), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_a_deterministic_pass_uses_the_running_statistics_and_does_not_update_them() -> None:
    known = variables() | {
        "batch_stats": {"mean": np.full(6, 2.0, np.float32), "var": np.full(6, 9.0, np.float32)}
    }
    y, updated = NORM.apply(known, X, deterministic=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, formula(np.full(6, 2.0), np.full(6, 9.0)), rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], known["batch_stats"])


def test_without_a_mutable_collection_training_only_normalizes() -> None:
    assert NORM.apply(variables(), X, deterministic=False).shape == X.shape


def test_initial_statistics_are_zero_mean_and_unit_variance() -> None:
    statistics = variables()["batch_stats"]
    np.testing.assert_array_equal(statistics["mean"], np.zeros(6))
    np.testing.assert_array_equal(statistics["var"], np.ones(6))
