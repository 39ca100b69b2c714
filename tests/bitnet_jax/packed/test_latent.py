"""Unpacking: latent weights that pack to the same codes and scales, for every packed quantizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.packed import packing
from bitnet_jax.packed.latent import _latent, unpack_model
from bitnet_jax.packed.packing import PackingError
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.registry import WEIGHT_QUANTIZERS
from bitnet_kernels import pack, unpack

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "ffn_size": 96,
    "num_heads": 2,
    "max_length": 16,
}
SUM = 32 * 64 * float(np.finfo(np.float32).eps)  # of a scale: a float32 sum of equal values, one by one
PACKED = [name for name, record in WEIGHT_QUANTIZERS.items() if Precision(weight=name).packed_format]


def packed_weights(variables: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    flat = flatten_dict(variables["packed"], sep="/")
    return {path: (np.asarray(unpack(w)), np.asarray(w.scale)) for path, w in flat.items()}


@pytest.mark.extended(after=15)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 32])
@pytest.mark.parametrize("weight", PACKED)
def test_latent_weights_pack_to_the_same_codes_and_scales(weight: str, granularity: Any) -> None:
    if granularity != "tensor" and "granularity" not in WEIGHT_QUANTIZERS[weight].uses:
        pytest.skip("a quantizer with one scale")
    precision = Precision(weight=weight, activation="int8", granularity=granularity)
    params = {"layer/weight": jax.random.normal(jax.random.key(0), (32, 64))}
    layer = packing.layers({"layer": precision}, params)["layer"]
    packed = packing.pack(params, {"layer": precision})
    again = _latent("layer", layer, packed["packed"]["layer"]["weight"])
    for (codes, scale), (codes_again, scale_again) in zip(
        packed_weights(packed).values(),
        packed_weights(packing.pack(again, {"layer": precision})).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(codes_again, codes)
        np.testing.assert_allclose(scale_again, scale, rtol=SUM)


@pytest.mark.parametrize("weight", ["ternary_absmean", "int8", "int4"])
def test_the_scale_of_zeros_is_arbitrary(weight: str) -> None:
    """Files of other programs store 0 or 1 for a matrix of zeros, which the quantizer would not."""
    precision = Precision(weight=weight, activation="int8")
    params = {"layer/weight": jnp.zeros((32, 64))}
    layer = packing.layers({"layer": precision}, params)["layer"]
    packed = pack(jnp.zeros((32, 64), jnp.int8), jnp.ones((1, 1)), format=layer.format)
    np.testing.assert_array_equal(_latent("layer", layer, packed)["layer/weight"], params["layer/weight"])


@pytest.mark.extended(after=1)
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bitnet_b158"},
        {"precision": "bitnet"},
        {"precision": "bitnet_b158", "head": "int8", "tie_embeddings": True},
        {"precision": "bitnet_b158", "head": "int8", "tie_embeddings": False},
    ],
)
def test_an_unpacked_model_packs_to_the_packed_one(options: dict[str, Any]) -> None:
    config = ModelConfig(**SHAPE, num_layers=1, **options)
    packed = packing.pack(init_variables(config, jax.random.key(0))["params"], config)
    latent = unpack_model(config, packed)
    assert "packed" not in latent
    again = packing.pack(latent["params"], config)
    assert packed_weights(again).keys() == packed_weights(packed).keys()
    for path, (codes, scale) in packed_weights(packed).items():
        np.testing.assert_array_equal(packed_weights(again)[path][0], codes)
        np.testing.assert_allclose(packed_weights(again)[path][1], scale, rtol=SUM)


def test_codes_of_another_quantizer_are_rejected() -> None:
    binary = ModelConfig(**SHAPE, num_layers=1, precision="bitnet")
    ternary = ModelConfig(**SHAPE, num_layers=1, precision="bitnet_b158")
    packed = packing.pack(init_variables(ternary, jax.random.key(0))["params"], ternary)
    with pytest.raises(PackingError, match="layers_0/attention/q_proj: no latent weights"):
        unpack_model(binary, packed)
