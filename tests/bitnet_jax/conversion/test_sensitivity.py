"""The harm of one layer alone: its formula, and the model that it is measured on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.conversion.blocks import Settings
from bitnet_jax.conversion.calibration import Stream, embedded
from bitnet_jax.conversion.sensitivity import FloatBlock, Probe, block_harms, divergence
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.packed.proof import logits

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, ffn_size=64, num_layers=3, num_heads=4, num_kv_heads=2, max_length=32,
    norm_placement="pre", mlp="silu_glu", precision="float32", init_std=0.1,
)  # fmt: skip
SETTINGS = {name: Settings(grid=name, method="gptq", granularity=32) for name in ("binary", "4")}


def test_divergence_by_hand() -> None:
    """Of (1/2, 1/2) and (3/4, 1/4): ln(2/3) / 2 + ln(2) / 2."""
    p, q = jnp.zeros((1, 2)), jnp.log(jnp.array([[3.0, 1.0]]))
    assert float(divergence(p, q)) == pytest.approx(np.log(4 / 3) / 2, rel=1e-6)
    assert float(divergence(p, p + 5)) < 1e-12  # the same probabilities


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1, 10])
def test_small_and_large_divergences_keep_their_digits(size: float) -> None:
    rng = np.random.default_rng(0)
    p = rng.normal(size=(7, 100)).astype(np.float32)
    q = (p + size * rng.normal(size=p.shape)).astype(np.float32)
    log_p, log_q = (
        x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p.astype(float), q.astype(float))
    )
    expected = np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))
    # float32 logits of size 1 round to 1e-7, a part of 1e-3 of the smallest differences here.
    assert float(divergence(jnp.asarray(p), jnp.asarray(q))) == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize("placement", ["pre", pytest.param("post", marks=pytest.mark.extended)])
def test_the_harm_is_that_of_the_model_with_one_matrix_changed(placement: str) -> None:
    config = dataclasses.replace(CONFIG, norm_placement=placement)
    params = init_variables(config, jax.random.key(0))["params"]
    tokens = np.random.default_rng(1).integers(0, 50, (2, 16)).astype(np.int32)
    rounded = dataclasses.replace(config, precision=SETTINGS["4"].rules)
    blocks = [FloatBlock.of(params, layer, SETTINGS["4"]) for layer in range(3)]
    probe = Probe(rounded, params, blocks, tokens)
    assert probe.kl({}) == 0
    probe.advance()
    path = "mlp/up_proj"
    changed = blocks[1].weights[path] * np.float32(0.5)
    params["layers_1"]["mlp"]["up_proj"]["weight"] = jnp.asarray(changed)
    both = [logits(config.module(), {"params": one}, jnp.asarray(tokens)) for one in (
        init_variables(config, jax.random.key(0))["params"], params
    )]  # fmt: skip
    expected = np.mean([divergence(p, q) for p, q in zip(*both, strict=True)])
    assert probe.kl({path: changed}) == pytest.approx(expected, rel=1e-2)  # inputs of layers in 16 bits


def test_the_harms_of_a_block() -> None:
    params = init_variables(CONFIG, jax.random.key(0))["params"]
    tokens = np.random.default_rng(1).integers(0, 50, (20, 16)).astype(np.int32)
    config = dataclasses.replace(CONFIG, precision=SETTINGS["4"].rules)
    blocks = [FloatBlock.of(params, layer, SETTINGS["4"]) for layer in range(3)]
    probe = Probe(config, params, blocks, tokens[:2])
    counted: list[None] = []
    stream = Stream(config, embedded(config, params, tokens[2:]))
    harms = block_harms(probe, stream, SETTINGS, lambda: counted.append(None))
    assert len(counted) == 14
    for its in harms.values():
        assert 0 < its["4"].kl < 0.2 * its["binary"].kl
        assert 0 < its["4"].error < 0.2 * its["binary"].error
