"""Weights sharded over devices travel as packed codes: fewer bytes, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.nn import linear
from bitnet_jax.nn.packed_gather import gathered, pack_bytes, unpack_bytes
from bitnet_jax.training.collectives import collectives
from bitnet_jax.training.optimizers import OptimizerConfig, make_optimizer
from bitnet_jax.training.sharding import MeshConfig, batch_sharding, make_mesh, state_shardings
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import init_variables, model_loss
from bitnet_kernels import FORMATS

BITS = {"binary": 1, "ternary2": 2, "ternary5": 2, "int4": 4, "uint4": 4, "int8": 8}


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_survives_packing(format: str) -> None:
    values = list(FORMATS[format].values)
    codes = np.random.default_rng(0).choice(values, (5, 64)).astype(np.float32)
    packed = pack_bytes(jnp.asarray(codes), format)
    assert packed.shape == (5, 64 * BITS[format] // 8)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_bytes(packed, format), codes)


def gathers(program: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of what a compiled program gathers."""
    found = collectives(program)
    return [(one.dtype, one.shape) for one in found if one.operation == "all-gather" and one.shape]


def step_of(recipe: str) -> tuple[Callable[[], float], str, ModelConfig]:
    """One update on two devices with fsdp: it as a call that returns the loss, its program, and the model."""
    config = ModelConfig(
        vocab_size=48, hidden_size=32, num_layers=1, num_heads=4, ffn_size=64, max_length=16, precision=recipe
    )
    mesh = make_mesh(MeshConfig(fsdp=2))
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), 4)
    state = TrainState.create(jax.jit(init_variables, static_argnums=0)(config, jax.random.key(0)), optimizer)
    shardings = state_shardings(mesh, state)
    update = make_train_step(
        model_loss(Transformer(config)), optimizer, total_steps=4, statistics_every=0, shardings=shardings
    )
    tokens = np.random.default_rng(0).integers(0, 48, (4, 17)).astype(np.int32)
    with jax.set_mesh(mesh):
        batch = jax.device_put({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, batch_sharding(mesh))
        placed = jax.device_put(state, shardings)
        compiled = update.lower(placed, batch, jax.random.key(1)).compile()

    def run() -> float:
        with jax.set_mesh(mesh):
            fresh = jax.device_put(jax.device_get(state), shardings)
            return float(jax.block_until_ready(update(fresh, batch, jax.random.key(1)))[1]["loss"])

    return run, compiled.as_text(), config


@pytest.mark.parametrize(("recipe", "bits"), [("bitnet_b158", 2), ("bitnet", 1)])
def test_no_float_of_a_quantized_matrix_is_gathered(recipe: str, bits: int) -> None:
    _, program, config = step_of(recipe)
    matrices = {shape for shape in config.linear_shapes().values() if shape[0] != config.vocab_size}
    packed = {(n, k * bits // 8) for n, k in matrices}
    moved = gathers(program)
    assert packed <= {shape for dtype, shape in moved if dtype == "u8"}
    sizes = {n * k for n, k in matrices}
    wide = [(dtype, shape) for dtype, shape in moved if dtype != "u8" and int(np.prod(shape)) in sizes]
    assert wide == []
    _, of_float, _ = step_of("float32")
    assert any(dtype == "f32" and shape in matrices for dtype, shape in gathers(of_float))


def test_the_loss_has_the_bits_of_gathered_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _, _ = step_of("bitnet_b158")
    loss = packed()
    monkeypatch.setattr(linear, "gathered", lambda codes, format, layer: codes)
    floats, program, _ = step_of("bitnet_b158")
    assert not any(dtype == "u8" for dtype, _ in gathers(program))
    assert floats() == loss


def test_the_gradient_of_the_codes_passes_unchanged() -> None:
    codes = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (8, 32)), jnp.float32)
    weights: Any = jnp.arange(256.0).reshape(8, 32)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2))):
        same, pullback = jax.vjp(jax.jit(lambda c: gathered(c, "ternary2", "q_proj")), codes)
        np.testing.assert_array_equal(same, codes)
        np.testing.assert_array_equal(pullback(weights)[0], weights)
        odd = codes[:, :31]
        assert gathered(odd, "ternary2", "q_proj") is odd  # does not fill bytes
    assert gathered(codes, "ternary2", "q_proj") is codes
