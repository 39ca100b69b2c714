"""Updates on 2 x 2 x 2 devices against the same updates on one. test_sharding.py runs this file in a process that
has eight virtual devices; its name keeps pytest from collecting it otherwise, as other tests have two."""

from __future__ import annotations

from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.optimizers import Optimizer, OptimizerConfig, make_optimizer
from bitnet_jax.training.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    state_shardings,
    with_shardings,
)
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import Metrics, make_train_step
from bitnet_jax.training.task import init_variables, model_loss

ALONE, SPLIT = MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)
STEPS, LEARNING_RATE = 4, 0.01
TOKENS = np.random.default_rng(0).integers(0, 64, (STEPS, 8, 17)).astype(np.int32)

# Devices add parts of a float32 sum in a different order. Relative to a gradient that is about 1e-6, which Adam
# (with a large epsilon, or it would amplify gradients that are exactly zero in theory) makes that part of an update.
TOLERANCE = {"float32": STEPS * LEARNING_RATE * 1e-4}
# Occasionally such a difference rounds one activation to a neighbouring one of its 255 codes, which changes the
# gradients of one token by about one percent.
TOLERANCE |= {recipe: STEPS * LEARNING_RATE * 1e-2 for recipe in ("bitnet_b158", "bitnet")}


class Run(NamedTuple):
    state: TrainState
    metrics: list[Metrics]


def model(recipe: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=64,
        max_length=16,
        tie_embeddings=False,
        precision=recipe,
    )


def optimizer() -> Optimizer:
    config = OptimizerConfig(schedule="constant", learning_rate=LEARNING_RATE, epsilon=1e-3)
    return make_optimizer(config, STEPS)


def first_state(recipe: str) -> TrainState:
    return jax.jit(lambda key: TrainState.create(init_variables(model(recipe), key), optimizer()))(
        jax.random.key(0)
    )


def placed(state: TrainState, mesh: Mesh) -> TrainState:
    return jax.device_put(jax.device_get(state), state_shardings(mesh, state))


def updated(recipe: str, sizes: MeshConfig, state: TrainState, steps: range) -> Run:
    config, mesh = model(recipe), make_mesh(sizes)
    update = make_train_step(
        model_loss(Transformer(config)),
        optimizer(),
        total_steps=STEPS,
        precisions=config.precisions(),
        shardings=state_shardings(mesh, state),
    )
    metrics = []
    with jax.set_mesh(mesh):
        state = placed(state, mesh)
        for step in steps:
            batch = {"inputs": TOKENS[step, :, :-1], "targets": TOKENS[step, :, 1:]}
            state, measured = update(state, jax.device_put(batch, batch_sharding(mesh)), jax.random.key(1))
            metrics.append(jax.device_get(jax.block_until_ready(measured)))
    return Run(state, metrics)


def codes(recipe: str, state: TrainState) -> dict[str, np.ndarray]:
    found = {}
    for path, precision in model(recipe).precisions().items():
        if precision.quantizes_weights:
            weight: Any = reduce(lambda tree, name: tree[name], path.split("/"), state.params)["weight"]
            found[path] = np.asarray(precision.quantize_weight(jnp.asarray(jax.device_get(weight))).codes)
    return found


def assert_same(recipe: str, one: Run, other: Run) -> None:
    for ours, theirs in zip(one.metrics, other.metrics, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-3)
        a, b = ours["statistics"], theirs["statistics"]
        # a mean over part of the matrix would be off by percents; over all of it, only by summation order
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-5)
        assert np.array_equal(a.zero_fraction, b.zero_fraction)
        assert np.array_equal(a.flip_rate, b.flip_rate)

    def close(path: Any, a: jax.Array, b: jax.Array) -> None:
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=TOLERANCE[recipe], err_msg=name)

    jax.tree_util.tree_map_with_path(close, one.state.params, other.state.params)
    ours, theirs = codes(recipe, one.state), codes(recipe, other.state)
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert np.array_equal(ours[path], theirs[path]), path


@cache
def alone(recipe: str) -> Run:
    return updated(recipe, ALONE, first_state(recipe), range(STEPS))


# slow: binary weights take the way of ternary ones
@pytest.mark.parametrize("recipe", ["float32", "bitnet_b158", pytest.param("bitnet", marks=pytest.mark.slow)])
def test_updates_on_a_mesh_equal_those_on_one_device(recipe: str) -> None:
    one = alone(recipe)
    split = updated(recipe, SPLIT, first_state(recipe), range(STEPS))
    assert_same(recipe, one, split)
    assert len(codes(recipe, split.state)) == (0 if recipe == "float32" else 7)
    if recipe != "float32":
        assert all((run.metrics[-1]["statistics"].flip_rate > 0).all() for run in (one, split))


def shards(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.addressable_shards[0].data.shape
        for path, leaf in leaves
    }


def test_a_run_resumes_from_its_checkpoint_on_another_mesh(tmp_path: Path) -> None:
    recipe, other = "bitnet_b158", MeshConfig(fsdp=4, tensor=2)
    half = updated(recipe, SPLIT, first_state(recipe), range(STEPS // 2))
    held = shards(half.state)
    for path, shape in {
        "attention/q_proj/weight": (16, 16),
        "attention/k_proj/weight": (8, 16),
        "attention/o_proj/weight": (16, 16),
        "mlp/up_proj/weight": (32, 16),
        "mlp/down_proj/weight": (16, 32),
        "mlp/sub_norm/scale": (64,),
    }.items():
        for part in ("params", "opt_state/1/mu", "opt_state/1/nu"):
            assert held[f"{part}/layers_0/{path}"] == shape, (part, path)
    assert held["opt_state/1/mu/embed/embedding"] == held["opt_state/1/nu/lm_head/weight"] == (32, 16)

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(STEPS // 2, half.state.variables, half.state.opt_state, {})
        checkpoints.wait()
        shapes = jax.eval_shape(lambda: half.state)
        shapes = with_shardings(shapes, state_shardings(make_mesh(other), shapes))
        restored = checkpoints.restore(shapes.variables, shapes.opt_state)
    state = TrainState(half.state.step, restored.variables["params"], restored.opt_state)
    assert shards(state.opt_state)["1/mu/layers_0/mlp/down_proj/weight"] == (8, 32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), jax.device_get(half.state), state)

    rest = updated(recipe, other, state, range(STEPS // 2, STEPS))
    assert_same(recipe, alone(recipe), Run(rest.state, half.metrics + rest.metrics))
