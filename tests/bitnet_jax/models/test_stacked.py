"""Layers stacked for a scan: names and back, the same updates, and a program whose size does not depend on depth."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer, init_variables
from bitnet_jax.models.stacked import equal_layers, is_stacked, located, stack, stack_like, unstack
from bitnet_jax.packed import pack
from bitnet_jax.training.collectives import collectives
from bitnet_jax.training.optimizers import OptimizerConfig, clip_latents, make_optimizer
from bitnet_jax.training.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    partition_spec,
    state_shardings,
)
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import model_loss

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=64,
    max_length=16,
    mlp="relu2",
)
MIXED = dataclasses.replace(
    CONFIG,
    no_rope_layers=(3,),
    precision=(("layers_0/mlp/*", "bitnet"), ("*", "bitnet_b158")),
    remat=True,
)
TOKENS = np.random.default_rng(0).integers(0, 48, (3, 4, 17)).astype(np.int32)


def optimizer(**fields: Any) -> Any:
    return make_optimizer(OptimizerConfig(schedule="constant", learning_rate=0.01, epsilon=1e-3, **fields), 4)


def state_of(config: ModelConfig, stacked: bool, **fields: Any) -> TrainState:
    def create(key: jax.Array) -> TrainState:
        variables = init_variables(config, key)
        return TrainState.create(
            stack(variables, equal_layers(config)) if stacked else variables, optimizer(**fields)
        )

    return jax.jit(create)(jax.random.key(0))


def update_of(config: ModelConfig, **fields: Any) -> Any:
    return make_train_step(
        model_loss(Transformer(config)), optimizer(**fields), total_steps=4, precisions=config.precisions()
    )


def batch(step: int) -> dict[str, np.ndarray]:
    return {"inputs": TOKENS[step, :, :-1], "targets": TOKENS[step, :, 1:]}


def test_layers_are_stacked_in_runs_of_equal_ones_and_back() -> None:
    assert equal_layers(CONFIG) == (range(4),)
    assert equal_layers(MIXED) == (range(1), range(1, 3), range(3, 4))
    state = state_of(MIXED, False)
    stacked = stack(state, equal_layers(MIXED))
    assert [name for name in stacked.params if is_stacked(name)] == ["layers_1-2"]
    assert {"layers_0", "layers_3", "embed", "final_norm"} <= stacked.params.keys()
    assert stacked.opt_state[1].mu["layers_1-2"]["mlp"]["up_proj"]["weight"].shape == (2, 64, 32)
    assert located(stacked.params, "layers_2/mlp/up_proj") == ("layers_1-2/mlp/up_proj", 1)
    assert located(stacked.params, "layers_3/mlp/up_proj") == ("layers_3/mlp/up_proj", 0)
    again = unstack(stacked)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    jax.tree.map(np.testing.assert_array_equal, stack_like(again, stacked), stacked)
    jax.tree.map(np.testing.assert_array_equal, stack_like(again, state), state)


def updated(stacked: bool, steps: int, **fields: Any) -> tuple[TrainState, list[Any]]:
    state, update, rows = state_of(MIXED, stacked, **fields), update_of(MIXED, **fields), []
    for step in range(steps):
        state, metrics = update(state, batch(step), jax.random.key(1))
        rows.append(jax.device_get(metrics))
    return unstack(state), rows


@pytest.mark.extended
def test_updates_of_stacked_layers_have_the_bits_of_those_of_layers_one_by_one() -> None:
    """Without clipping, whose factor is a norm: a sum over all parameters, which is taken in another order."""
    (one, rows), (scanned, scanned_rows) = (updated(stacked, 3, clip_norm=None) for stacked in (False, True))
    for ours, theirs in zip(rows, scanned_rows, strict=True):
        assert ours["loss"] == theirs["loss"]
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-6)
        # per layer, in the order of the layers; a scale is a mean
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            *(row["statistics"] for row in (ours, theirs)),
        )
    jax.tree.map(np.testing.assert_array_equal, one, scanned)
    packed, scanned_packed = (pack(state.params, MIXED.precisions()) for state in (one, scanned))
    assert "layers_2" in scanned_packed["packed"]
    jax.tree.map(np.testing.assert_array_equal, packed, scanned_packed)


def operations(layers: int, stacked: bool) -> int:
    config = dataclasses.replace(CONFIG, num_layers=layers)
    state = jax.eval_shape(lambda: state_of(config, stacked))
    return len(update_of(config).lower(state, batch(0), jax.random.key(1)).as_text().splitlines())


@pytest.mark.extended
def test_the_size_of_an_update_does_not_depend_on_depth() -> None:
    assert operations(16, stacked=True) == operations(4, stacked=True)
    assert operations(4, stacked=False) > 1.5 * operations(2, stacked=False)


@pytest.mark.extended
def test_stacked_parameters_are_split_clipped_and_decayed_as_those_of_a_layer() -> None:
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    for name, shape in {
        "attention/o_proj/weight": (8, 8),
        "mlp/up_proj/weight": (8, 8),
        "mlp/n/scale": (8,),
    }.items():
        one = partition_spec(f"params/layers_0/{name}", shape, sizes)
        stacked = partition_spec(f"opt_state/1/mu/layers_0-3/{name}", (4, *shape), sizes)
        assert tuple(stacked) == ((None, *one) if len(shape) == 2 else ())
    config = dataclasses.replace(CONFIG, precision="binaryconnect")
    state = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: state_of(CONFIG, True))
    )
    big = jax.tree.map(lambda x: jnp.full_like(x, 3.0), state.params)
    clipped = clip_latents(big, config.precisions())
    assert float(clipped["layers_0-3"]["mlp"]["up_proj"]["weight"].max()) == 1.0
    assert float(clipped["layers_0-3"]["mlp_norm"]["scale"].max()) == 3.0

    updates, _ = optimizer(weight_decay=0.5).update(state.params, state.opt_state, big, state.step)
    assert float(updates["layers_0-3"]["mlp"]["up_proj"]["weight"].max()) < 0
    assert not updates["layers_0-3"]["mlp_norm"]["scale"].any()  # two axes, but a norm


@pytest.mark.extended
def test_no_float_of_a_quantized_matrix_is_gathered_in_the_scan() -> None:
    mesh, state = make_mesh(MeshConfig(fsdp=2)), state_of(CONFIG, True)
    shardings = state_shardings(mesh, state)
    update = make_train_step(
        model_loss(Transformer(CONFIG)), optimizer(), total_steps=4, statistics_every=0, shardings=shardings
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, shardings)
        text = update.lower(placed, jax.device_put(batch(0), batch_sharding(mesh)), jax.random.key(1))
    gathers = [one for one in collectives(text.compile().as_text()) if one.operation == "all-gather"]
    matrices = {n * k for path, (n, k) in CONFIG.linear_shapes().items() if path != "lm_head"}
    of_weights = [one for one in gathers if np.prod(one.shape) in matrices | {size // 4 for size in matrices}]
    assert {one.dtype for one in of_weights} == {"u8"}
