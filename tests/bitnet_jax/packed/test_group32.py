"""Models in blocks of 32: packed equal to latent, stored in the bytes of llama.cpp's types, and read back."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.interop import gguf_export, huggingface_export
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.packed import PackingError, load_packed, packing, prove, save_packed
from bitnet_jax.packed.latent import unpack_model
from bitnet_jax.tools.random_model import write_random

RECIPES = {
    "int4_group32": 18,
    "uint4_group32": 20,
    "int8_group32": 34,
}  # bytes of a block of Q4_0, Q4_1 and Q8_0


def config_of(recipe: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=48, hidden_size=64, num_layers=1, num_heads=2, ffn_size=96, max_length=32, precision=recipe
    )


@pytest.mark.extended(after=1)
@pytest.mark.slow(after=2)
@pytest.mark.optimized
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_packed_model_equals_the_latent_one_bit_for_bit_and_survives_a_file(
    recipe: str, tmp_path: Path
) -> None:
    config = config_of(recipe)
    latent = init_variables(config, jax.random.key(0))
    packed = packing.pack(latent["params"], config)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 12))
    proof = prove(config, latent, packed, tokens)
    assert (proof.matrices, proof.max_relative_logit_error) == (7, 0)

    weight = packed["packed"]["layers_0"]["mlp"]["up_proj"]["weight"]
    assert weight.scale.dtype == jnp.float16
    assert weight.nbytes == 96 * 64 // 32 * RECIPES[recipe]
    save_packed(tmp_path / "model", packed, config)
    loaded = load_packed(tmp_path / "model", verify=True).variables
    assert jax.tree.structure(loaded["packed"]) == jax.tree.structure(packed["packed"])
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(packed), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)

    again = packing.pack(unpack_model(config, loaded)["params"], config)
    for one, other in zip(jax.tree.leaves(again["packed"]), jax.tree.leaves(packed["packed"]), strict=True):
        np.testing.assert_array_equal(
            one, other
        )  # bit for bit: float16 scales absorb the rounding of float32


@pytest.mark.parametrize("recipe", RECIPES)
def test_writers_that_cannot_hold_the_codes_refuse_by_name(recipe: str, tmp_path: Path) -> None:
    config = config_of(recipe)
    params = init_variables(config, jax.random.key(0))["params"]
    name = recipe.partition("_")[0]
    with pytest.raises(ValueError, match=f"weight='{name}', expected a ternary quantizer"):
        gguf_export.write(tmp_path / "model.gguf", config, {"params": params})
    with pytest.raises(ValueError, match=name):
        huggingface_export.save(tmp_path / "model", config, {"params": params}, form="unpacked")


def test_a_scale_beyond_float16_is_refused() -> None:
    config = config_of("int4_group32")
    params = init_variables(config, jax.random.key(0))["params"]
    weight = params["layers_0"]["attention"]["q_proj"]["weight"]
    params["layers_0"]["attention"]["q_proj"]["weight"] = weight.at[3, 5].set(1e6)
    with pytest.raises(PackingError, match="q_proj: .* scales beyond the 65504 of float16"):
        packing.pack(params, config)


def test_a_random_model_has_a_minimum(tmp_path: Path) -> None:
    config = config_of("uint4_group32")
    write_random(tmp_path / "model", config, progress=False)
    weight = load_packed(tmp_path / "model").variables["packed"]["layers_0"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_allclose(weight.minimum, -7.5 * weight.scale.astype(jnp.float32), rtol=2.0**-10)
