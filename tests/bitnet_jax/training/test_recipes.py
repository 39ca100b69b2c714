"""Every named recipe trains: ten updates of a tiny language model, finite and downhill on a text it sees again."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_jax.training.optimizers import OptimizerConfig, make_optimizer
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import init_variables, model_loss

STEPS = 10
# 256 inputs everywhere, so that the largest scale groups and the Hadamard rotation fit.
SHAPE = {
    "vocab_size": 17,
    "hidden_size": 256,
    "ffn_size": 256,
    "num_layers": 1,
    "num_heads": 2,
    "max_length": 8,
}
# Latents near 0 make codes that are coin flips, whose noise drowns what ten updates can learn.
RANDOM = ("binaryconnect_stochastic",)


def train(recipe: str, accumulate: int = 1, **fields: Any) -> tuple[TrainState, list[float]]:
    """The state after ten updates on one batch of random tokens, and the loss at each."""
    config = ModelConfig(**SHAPE, precision=recipe, mlp="relu", **fields)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, schedule="constant"), STEPS)
    update = make_train_step(
        model_loss(Transformer(config)),
        optimizer,
        total_steps=STEPS,
        precisions=config.precisions(),
        accumulate=accumulate,
        statistics_every=0,  # have their own tests; leaving them out halves the compilation
    )
    tokens = np.random.default_rng(0).integers(0, 17, (4, 9)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    init = jax.jit(init_variables, static_argnums=0)
    state = TrainState.create(init(config, jax.random.key(0)), optimizer)
    losses = []
    for _ in range(STEPS):
        state, metrics = update(state, batch, jax.random.key(1))
        assert bool(metrics["finite"])
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_updates_are_finite_and_learn(recipe: str) -> None:
    state, losses = train(recipe)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # The same four lines ten times over: a layer without a working gradient would still let the embedding learn
    # them a little, a wrong sign anywhere would not get this far down from ln 17 = 2.83.
    if recipe not in RANDOM:
        assert losses[-1] < 0.8 * losses[0]


def test_int8_products_train_alike() -> None:
    options = {"accumulate": 2, "dtype": "bfloat16", "head": "int8"}
    losses = {
        product: np.array(train("bitnet_b158", product=product, **options)[1])
        for product in ("float", "int8", "int8_gradients")
    }
    # The same sums, and gradients that differ by rounding at most; a code may flip over it and move a loss a little.
    np.testing.assert_allclose(losses["int8"], losses["float"], rtol=1e-3)
    # Rounded gradients are other gradients (the first loss has seen none), and as good.
    assert losses["int8_gradients"][0] == losses["float"][0]
    assert (losses["int8_gradients"][1:] != losses["float"][1:]).all()
    learned = {product: values[0] - values[-1] for product, values in losses.items()}
    assert learned["int8_gradients"] > 0.95 * learned["float"]
