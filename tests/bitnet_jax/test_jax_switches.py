"""Packing, generation and training give the same numbers under every JAX config option that a user may have set."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.inference.generation import generate, left_pad
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing
from bitnet_jax.training.config import OptimizerConfig
from bitnet_jax.training.optimizers import make_optimizer
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import model_loss

CONFIG = ModelConfig(
    vocab_size=23, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=16, max_length=16,
    init_std=0.5,
)  # fmt: skip
TOKENS, MASK = left_pad([[3, 1, 4], [1]])
SAMPLED = SamplingConfig(temperature=0.9, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1)


def set_to(name: str, value: Any) -> Any:
    @contextlib.contextmanager
    def switched() -> Any:
        before = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            yield
        finally:
            jax.config.update(name, before)

    return switched()


def numbers() -> dict[str, np.ndarray]:
    """Codes, tokens and losses of training, packing and generating with a small model."""
    variables = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    packed = packing.pack(variables["params"], CONFIG)
    key = jax.random.key(3)
    generation = generate(CONFIG, packed, TOKENS, MASK, max_new_tokens=4, sampling=SAMPLED, key=key)
    optimizer = make_optimizer(OptimizerConfig(), 2)
    step = make_train_step(
        model_loss(Transformer(CONFIG)), optimizer, total_steps=2, precisions=CONFIG.precisions()
    )
    state = TrainState.create(variables, optimizer)
    batch, losses = {"inputs": TOKENS, "targets": TOKENS[:, ::-1].copy()}, []
    for _ in range(2):
        state, metrics = step(state, batch, key)
        losses += [float(metrics["loss"]), float(metrics["grad_norm"])]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}
    return {
        "codes": np.asarray(packed["packed"]["layers_0"]["mlp"]["down_proj"]["weight"].codes),
        "tokens": np.asarray(generation.tokens),
        "losses": np.asarray(losses),
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    return numbers()


@pytest.mark.extended(after=1)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_debug_nans", True),
        pytest.param("jax_disable_jit", True, marks=pytest.mark.slow),  # each operation compiled separately
        pytest.param("jax_check_tracer_leaks", True, marks=pytest.mark.slow),  # changes no number
        # The settings of all other tests, and the user's defaults.
        ("jax_numpy_rank_promotion", "allow"),
        ("jax_numpy_dtype_promotion", "standard"),
    ],
)
def test_jax_config_options_do_not_change_results(
    name: str, value: Any, plain: dict[str, np.ndarray]
) -> None:
    assert (jax.config.jax_numpy_rank_promotion, jax.config.jax_numpy_dtype_promotion) == ("raise", "strict")  # type: ignore[attr-defined]
    with set_to(name, value):
        got = numbers()
    np.testing.assert_array_equal(got["codes"], plain["codes"])
    np.testing.assert_array_equal(got["tokens"], plain["tokens"])
    # float32 sums of separately compiled operations, without fusion
    np.testing.assert_allclose(got["losses"], plain["losses"], rtol=1e-5)
