"""Every named recipe trains: ten updates of a tiny language model, finite and downhill on a text it sees again."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.precision import RECIPES
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_updates_are_finite_and_learn(recipe: str) -> None:
    config = ModelConfig(**SHAPE, precision=recipe, mlp="relu")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, schedule="constant"), STEPS)
    update = make_train_step(
        model_loss(Transformer(config)),
        optimizer,
        total_steps=STEPS,
        precisions=config.precisions(),
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
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # The same four lines ten times over: a layer without a working gradient would still let the embedding learn
    # them a little, a wrong sign anywhere would not get this far down from ln 17 = 2.83.
    if recipe not in RANDOM:
        assert losses[-1] < 0.8 * losses[0]
