"""RMSNorm and LayerNorm against their formulas."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import PRESETS, ModelConfig
from bitnet_jax.nn.mlp import MLP
from bitnet_jax.nn.norms import NORMS, Norm, sub_norm

X = np.random.default_rng(0).normal(2.0, 3.0, (4, 32)).astype(np.float32)


def formula(kind: str, x: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("eps", [1e-5, 1.0])
def test_norms_match_their_formulas(kind: str, eps: float) -> None:
    np.testing.assert_allclose(
        NORMS[kind](jnp.asarray(X), eps=eps), formula(kind, X, eps), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", NORMS)
def test_a_zero_row_stays_zero_and_has_a_finite_gradient(kind: str) -> None:
    zero = jnp.zeros((2, 8))
    np.testing.assert_array_equal(NORMS[kind](zero, eps=1e-5), zero)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(NORMS[kind](x, eps=1e-5)))(zero)).all()


def test_the_gain_multiplies_after_the_cast() -> None:
    x = jnp.asarray(X, jnp.bfloat16)
    scale = jnp.linspace(0.5, 1.5, 32)
    y = Norm("rmsnorm", 1e-5).apply({"params": {"scale": scale}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, NORMS["rmsnorm"](x, eps=1e-5) * scale.astype(jnp.bfloat16)[None, :])


def test_mlp_kinds_match_their_formulas() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 3, 64))
    formulas = {
        "relu": lambda up, gate: np.maximum(up, 0),
        "relu2": lambda up, gate: np.maximum(up, 0) ** 2,
        "silu_glu": lambda up, gate: gate / (1 + np.exp(-gate)) * up,
        "relu2_glu": lambda up, gate: np.maximum(gate, 0) ** 2 * up,
    }
    for kind, expected in formulas.items():
        config = dataclasses.replace(
            PRESETS["tiny"], mlp=kind, precision="float32", norm_placement="pre", init_std=0.2
        )
        precisions = {
            p.removeprefix("layers_0/mlp/"): v for p, v in config.precisions().items() if "layers_0/mlp" in p
        }
        module = MLP(config, precisions)
        params = module.init(jax.random.key(1), x)["params"]
        w = {name: np.asarray(leaf["weight"]) for name, leaf in params.items()}
        up = np.asarray(x) @ w["up_proj"].T
        gate = np.asarray(x) @ w["gate_proj"].T if "gate_proj" in w else None
        want = expected(up, gate) @ w["down_proj"].T
        # float32 against float32 in a different summation order
        np.testing.assert_allclose(module.apply({"params": params}, x), want, rtol=1e-4, atol=1e-4)


def test_a_sub_norm_in_its_warm_up_by_hand() -> None:
    """x = (3, 4) has the root mean square 5 / sqrt(2); at half of the warm-up, the mean of x and norm(x)."""
    shape = dict(vocab_size=8, hidden_size=2, num_layers=1, num_heads=1, ffn_size=2, max_length=4)
    config = ModelConfig(**shape, sub_norm_warmup=0.5, norm_eps=1e-30)

    class Sub(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, progress: jax.Array) -> jax.Array:
            return sub_norm(config, x, progress)

    x, variables = jnp.array([[3.0, 4.0]]), {"params": {"sub_norm": {"scale": jnp.array([1.0, 2.0])}}}
    normed = np.array([[3.0, 8.0]]) * 2**0.5 / 5
    for progress, expected in ((0.0, x), (0.25, (x + normed) / 2), (0.5, normed), (1.0, normed)):
        y = Sub().apply(variables, x, jnp.float32(progress))
        np.testing.assert_allclose(y, expected, rtol=1e-6)
    with pytest.raises(
        ValueError, match="model.sub_norm_warmup: got 0.5 with norm_placement='pre', expected"
    ):
        dataclasses.replace(config, norm_placement="pre")
