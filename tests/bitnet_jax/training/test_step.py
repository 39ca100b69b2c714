"""The jitted update: accumulation, randomness, metrics, latent clipping."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax.models import BinaryMLP, BinaryMLPConfig, ModelConfig, Transformer
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.training.losses import LossSums, cross_entropy_sums
from bitnet_jax.training.optimizers import OptimizerConfig, make_optimizer
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import Task, init_variables, model_loss

STEPS = 10
KEY = jax.random.key(7)


def optimizer() -> Any:
    # a large epsilon: otherwise Adam amplifies the rounding error of a gradient that is exactly zero in theory
    return make_optimizer(OptimizerConfig(schedule="constant", learning_rate=0.05, epsilon=1e-3), STEPS)


def step_of(task: Task, **options: Any) -> Any:
    return make_train_step(task.loss, optimizer(), total_steps=STEPS, precisions=task.precisions, **options)


def fresh(task: Task) -> TrainState:
    return TrainState.create(task.init(jax.random.key(0)), optimizer())


def test_one_update_is_the_gradient_of_the_mean_loss_through_the_optimizer(toy: Task) -> None:
    batch = toy.train_batch(0) | {
        "weights": np.array([[1, 1, 0], [0, 1, 2], [1, 1, 1], [0, 0, 1]], np.float32)
    }
    before = fresh(toy)

    def mean_loss(params: Any) -> jax.Array:
        sums, _ = toy.loss(before.variables | {"params": params}, batch, None, 0.0)
        return sums.loss / sums.weight

    loss, gradients = jax.value_and_grad(mean_loss)(before.params)
    updates, _ = optimizer().update(gradients, before.opt_state, before.params, before.step)
    expected = optax.apply_updates(before.params, updates)

    after, metrics = step_of(toy)(before, batch, KEY)
    assert int(after.step) == 1
    # jit may order float32 sums differently
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after.params, expected)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    assert float(metrics["update_norm"]) == pytest.approx(float(optax.tree.norm(updates)), rel=1e-5)
    assert float(metrics["learning_rate"]) == np.float32(0.05)
    assert float(metrics["weight_decay"]) == np.float32(0.1)
    assert bool(metrics["finite"])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_add_up_to_the_full_batch(toy: Task, accumulate: int) -> None:
    """Including weights that differ between micro-batches, where a mean of means would be wrong."""
    weights = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 2, 0]], np.float32)
    whole, parts = step_of(toy), step_of(toy, accumulate=accumulate)
    a, b = fresh(toy), fresh(toy)
    for step in range(3):
        batch = toy.train_batch(step) | {"weights": weights}
        a, metrics_a = whole(a, batch, KEY)
        b, metrics_b = parts(b, batch, KEY)
        for name in ("loss", "accuracy", "grad_norm"):
            assert float(metrics_a[name]) == pytest.approx(float(metrics_b[name]), rel=1e-5), name
    # the same sums in a different order
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.params, b.params)


def noisy(variables: Any, batch: Any, key: jax.Array, progress: jax.Array) -> tuple[LossSums, dict[str, Any]]:
    """A task whose loss is a random number and whose accuracy is the training progress."""
    loss = jax.random.uniform(key) + 0 * jnp.sum(variables["params"]["w"]["weight"])
    return LossSums(loss, progress, jnp.float32(1)), {}


def test_randomness_and_progress_depend_only_on_key_and_step() -> None:
    def loss_at(step: int, seed: int, **options: Any) -> float:
        state = TrainState.create({"params": {"w": {"weight": jnp.ones(2)}}}, optimizer())
        update = make_train_step(noisy, optimizer(), total_steps=STEPS, **options)
        batch = {"inputs": np.zeros((2, 1), np.int32)}
        _, metrics = update(state.replace(step=jnp.int32(step)), batch, jax.random.key(seed))
        assert float(metrics["accuracy"]) == pytest.approx(step / STEPS)
        return float(metrics["loss"])

    assert loss_at(3, 1) == loss_at(3, 1)
    assert len({loss_at(step, seed) for step in (3, 4) for seed in (1, 2)}) == 4
    # micro-batches draw different numbers: their mean equals neither single draw
    assert loss_at(3, 1, accumulate=2) != loss_at(3, 1)


def exploding(variables: Any, batch: Any, key: Any, progress: Any) -> tuple[LossSums, dict[str, Any]]:
    w = variables["params"]["w"]["weight"]
    return LossSums(jnp.sum(w * batch["factor"]), jnp.float32(0), jnp.float32(1)), {}


@pytest.mark.parametrize(
    ("factor", "finite"), [(1.0, True), (np.nan, False), (np.inf, False), (3e38, False), (-1e30, False)]
)
def test_the_finite_flag_detects_overflowing_losses_and_gradients(factor: float, finite: bool) -> None:
    state = TrainState.create({"params": {"w": {"weight": jnp.array([1.0, 2.0])}}}, optimizer())
    _, metrics = make_train_step(exploding, optimizer(), total_steps=STEPS)(
        state, {"factor": np.full((2,), factor, np.float32)}, KEY
    )
    assert bool(metrics["finite"]) is finite


def test_statistics_can_be_infrequent_or_disabled(toy: Task) -> None:
    batch = toy.train_batch(0)
    state, metrics = step_of(toy, statistics_every=2)(fresh(toy), batch, KEY)
    assert (np.asarray(metrics["statistics"].zero_fraction) == -1).all()
    _, metrics = step_of(toy, statistics_every=2)(state, batch, KEY)
    _, always = step_of(toy)(step_of(toy)(fresh(toy), batch, KEY)[0], batch, KEY)
    np.testing.assert_array_equal(metrics["statistics"], always["statistics"])
    _, without = step_of(toy, statistics_every=0)(fresh(toy), batch, KEY)
    assert "statistics" not in without


def test_latents_stay_within_their_clip_range(toy: Task) -> None:
    precisions = {"out": Precision(weight="binary_raw", latent_clip=0.5)}
    update = make_train_step(toy.loss, optimizer(), total_steps=STEPS, precisions=precisions)
    state, metrics = update(fresh(toy), toy.train_batch(0), KEY)
    weight = np.asarray(state.params["out"]["weight"])
    assert np.abs(weight).max() == 0.5
    clipped = np.mean(np.abs(weight) >= 0.5)
    assert float(metrics["statistics"].clipped_share[0]) == pytest.approx(clipped)
    assert clipped > 0
    assert np.abs(state.params["embed"]["embedding"]).max() > 0.5


def test_frozen_parameters_keep_their_bits_and_have_no_part_in_the_gradient_norm(toy: Task) -> None:
    """Even beyond the clip range of their latents, and with weight decay."""
    precisions = {"out": Precision(weight="binary_raw", latent_clip=0.5)}
    settings = OptimizerConfig(schedule="constant", learning_rate=0.05, rates={"out/*": 0.0})
    moving = make_optimizer(settings, STEPS)
    update = make_train_step(toy.loss, moving, total_steps=STEPS, precisions=precisions, accumulate=2)
    variables = toy.init(jax.random.key(0))
    state = TrainState.create(jax.tree.map(jnp.array, variables), moving)
    for step in range(3):
        state, metrics = update(state, toy.train_batch(step), KEY)
    out, embedding = state.params["out"]["weight"], state.params["embed"]["embedding"]
    np.testing.assert_array_equal(out, variables["params"]["out"]["weight"])
    assert np.abs(out).max() > 0.5
    assert (np.asarray(embedding) != variables["params"]["embed"]["embedding"]).any()
    assert float(metrics["statistics"].weight_grad_norm[0]) == 0

    def loss(params: Any) -> jax.Array:
        sums, _ = toy.loss(variables | {"params": params}, toy.train_batch(0), None, 0.0)
        return sums.loss / sums.weight

    gradient = jax.grad(loss)(variables["params"])["embed"]["embedding"]
    _, first = update(TrainState.create(jax.tree.map(jnp.array, variables), moving), toy.train_batch(0), KEY)
    assert float(first["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-5)


SHAPE = dict(vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, ffn_size=8, max_length=4)
TOKENS = np.arange(8, dtype=np.int32).reshape(2, 4)


def model_with_variables(**fields: Any) -> tuple[Transformer, Any, Any]:
    """(model, variables, compiled loss); compiled, because running a model op by op takes seconds."""
    config = ModelConfig(**SHAPE, **fields)
    model = Transformer(config)
    loss = model_loss(model)
    return model, jax.jit(partial(init_variables, config))(jax.random.key(0)), jax.jit(lambda *a: loss(*a)[0])


def test_the_loss_of_a_language_model() -> None:
    model, variables, loss = model_with_variables(dropout=0.5)
    batch = {"inputs": TOKENS, "targets": (TOKENS + 1) % 8}
    quiet = loss(variables, batch, None, 1.0)
    logits = jax.jit(model.apply)(variables, TOKENS).logits
    plain = cross_entropy_sums(logits, batch["targets"])
    assert float(quiet.loss / quiet.weight) == pytest.approx(float(plain.loss / plain.weight))
    draws = {float(loss(variables, batch, jax.random.key(seed), 1.0).loss) for seed in (1, 1, 2)}
    assert len(draws) == 2  # a key enables dropout, the same key gives the same mask


def test_the_loss_of_a_classifier_ignores_padding() -> None:
    _, variables, loss = model_with_variables(num_classes=3, causal=False)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    batch = {"inputs": TOKENS, "targets": np.array([0, 2], np.int32), "mask": mask}
    sums = loss(variables, batch, None, 1.0)
    assert float(sums.weight) == 2
    assert loss(variables, dict(batch, inputs=np.where(mask, TOKENS, 7)), None, 1.0).loss == sums.loss
    assert loss(variables, dict(batch, inputs=np.where(mask, 7, TOKENS)), None, 1.0).loss != sums.loss


def test_the_model_state_passes_through_micro_batches_in_order(toy: Task) -> None:
    """Two updates of two micro-batches: four steps of a decaying average, whose value depends on their order."""
    update, state = step_of(toy, accumulate=2), fresh(toy)
    expected = 0.0
    for step in range(2):
        batch = toy.train_batch(step)
        state, _ = update(state, batch, KEY)
        for part in np.split(batch["inputs"], 2):
            expected = 0.9 * expected + float(part.sum())
    assert int(state.model_state["counts"]["batches"]) == 4
    assert float(state.model_state["counts"]["sum"]) == pytest.approx(expected, rel=1e-6)


def test_batch_statistics_are_computed_from_the_training_batches() -> None:
    config = BinaryMLPConfig(image_size=2, num_classes=3, hidden_size=4, num_layers=1)
    update = make_train_step(
        model_loss(BinaryMLP(config)), optimizer(), total_steps=STEPS, precisions=config.precisions()
    )
    variables = init_variables(config, jax.random.key(0))
    inputs = np.random.default_rng(0).normal(size=(8, 2, 2, 1)).astype(np.float32)
    batch = {"inputs": inputs, "targets": np.arange(8, dtype=np.int32) % 3}
    first = inputs.reshape(8, 4) @ np.asarray(variables["params"]["dense_0"]["weight"]).T
    state, metrics = update(TrainState.create(variables, optimizer()), batch, KEY)
    assert bool(metrics["finite"])
    found = state.model_state["batch_stats"]["dense_0_norm"]
    # float32 sums in a different order
    np.testing.assert_allclose(found["mean"], 0.1 * first.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * first.var(axis=0), rtol=1e-4)
