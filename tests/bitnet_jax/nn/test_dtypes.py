"""Layers and models take float32, bfloat16 or float16 (ids: integers); any other dtype is a one-line ValueError.

An integer input once came back as zeros: results are cast to the dtype of the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import (
    PRESETS,
    BinaryCNN,
    BinaryCNNConfig,
    BinaryMLP,
    BinaryMLPConfig,
    Transformer,
    VisionTransformer,
    VisionTransformerConfig,
)
from bitnet_jax.nn import attention, kv_cache, linear_attention
from bitnet_jax.nn.batch_norm import BatchNorm
from bitnet_jax.nn.conv import BitConv
from bitnet_jax.nn.embedding import Embedding
from bitnet_jax.nn.head import QuantizedHead
from bitnet_jax.nn.linear import BitLinear, dense
from bitnet_jax.nn.mlp import MLP
from bitnet_jax.nn.norms import NORMS, Norm
from bitnet_jax.nn.rotary import rotate
from bitnet_jax.quantization.arguments import Arguments
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_jax.quantization.records import ActivationQuantizer
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

pytestmark = pytest.mark.unchecked_annotations

FLOATS = ("float32", "bfloat16", "float16")
INTEGERS = ("int8", "int32", "uint8")
DTYPES = (*FLOATS, *INTEGERS, "bool", "complex64", "float64")

CONFIG = PRESETS["tiny"]
PRECISIONS = {path.split("/")[-1]: precision for path, precision in CONFIG.precisions().items()}
IMAGES = (2, 8, 8, 1)
HEADS = (2, 3, 4, 8)
POSITIONS, VISIBLE = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3, 3), bool)

Call = Callable[[jax.Array], object]


def module(layer: nn.Module, shape: tuple[int, ...], dtype: str = "float32", **options: object) -> Call:
    """layer of one array; its parameters come from an input of the right dtype."""
    variables = jax.jit(lambda key: layer.init(key, jnp.ones(shape, dtype), **options))(jax.random.key(0))
    return lambda x: layer.apply(variables, x, **options)


def with_scale(quantizer: ActivationQuantizer) -> Arguments:
    """Adds a learned scale if the quantizer supports one."""
    return Arguments(scale=jnp.float32(1.0) if "scale" in quantizer.uses else None)


def head(table: jax.Array) -> Call:
    embedding = Embedding(32, 64, "float32", "float32", 0.02)
    return lambda x: embedding.apply({"params": {"embedding": table}}, x, method="attend")


ROWS = (2, 64)
FLOAT_INPUTS: dict[str, tuple[Callable[[], Call], tuple[int, ...]]] = {
    **{
        f"BitLinear {name}": (lambda name=name: module(BitLinear(48, RECIPES[name]), ROWS), ROWS)
        for name in ("float32", "bfloat16", "bitnet", "bitnet_b158", "xnor")
    },
    "BitConv": (lambda: module(BitConv(4, RECIPES["xnor"]), IMAGES), IMAGES),
    "dense": (lambda: lambda x: dense(x, jnp.ones((8, 64))), ROWS),
    "BatchNorm": (lambda: module(BatchNorm(), ROWS, deterministic=True), ROWS),
    "Norm": (lambda: module(Norm(), ROWS), ROWS),
    **{name: (lambda f=f: lambda x: f(x, eps=1e-5), ROWS) for name, f in NORMS.items()},
    "MLP": (lambda: module(MLP(CONFIG, PRECISIONS), (1, 2, 64)), (1, 2, 64)),
    "Embedding.attend": (lambda: head(jnp.ones((32, 64))), (1, 2, 64)),
    "Embedding.attend bfloat16": (lambda: head(jnp.ones((32, 64), jnp.bfloat16)), (1, 2, 64)),
    "QuantizedHead": (
        lambda: module(QuantizedHead(dataclasses.replace(CONFIG, head="int8")), (1, 2, 64)), (1, 2, 64),
    ),
    "Attention": (
        lambda: module(
            attention.Attention(CONFIG, PRECISIONS), (2, 3, 64), positions=POSITIONS, visible=VISIBLE
        ),
        (2, 3, 64),
    ),
    "rotate": (lambda: lambda x: rotate(x, POSITIONS, 1e4), HEADS),
    "quantize_kv": (lambda: kv_cache.quantize_kv, HEADS),
    "dot_scores q": (lambda: lambda q: attention.dot_scores(q, jnp.ones(HEADS), 1.0), HEADS),
    "dot_scores k": (lambda: lambda k: attention.dot_scores(jnp.ones(HEADS), k, 1.0), HEADS),
    "mix_values": (lambda: lambda v: attention.mix_values(jnp.ones((2, 4, 3, 3)), v), HEADS),
    "write": (
        lambda: lambda k: kv_cache.write(
            kv_cache.KVCache(jnp.zeros(HEADS), jnp.zeros(HEADS)), k, k, jnp.int32(0)
        ),
        HEADS,
    ),
    "linear parallel": (lambda: lambda x: linear_attention.parallel(x, x, x, VISIBLE), HEADS),
    "linear chunked": (
        lambda: lambda x: linear_attention.chunked(x, x, x, linear_attention.zero_state(2, 4, 8)), HEADS,
    ),
    "linear recurrent": (
        lambda: lambda x: linear_attention.recurrent(x, x, x, linear_attention.zero_state(2, 4, 8)), HEADS,
    ),
    "BinaryMLP": (
        lambda: module(BinaryMLP(BinaryMLPConfig(image_size=8, num_classes=3, hidden_size=8)), IMAGES), IMAGES,
    ),
    "BinaryCNN": (
        lambda: module(BinaryCNN(BinaryCNNConfig(image_size=8, num_classes=3, widths=(4, 4))), IMAGES), IMAGES,
    ),
    **{
        f"weights {name}": (lambda q=q: lambda w: q(w), ROWS) for name, q in WEIGHT_QUANTIZERS.items()
    },
    **{
        f"activations {name}": (lambda q=q: lambda x: q(x, with_scale(q)), ROWS)
        for name, q in ACTIVATION_QUANTIZERS.items()
    },
}  # fmt: skip


def check(call: Call, shape: tuple[int, ...], taken: tuple[str, ...]) -> None:
    """Checks that the given dtypes have finite results, in one program, and that the others are rejected."""
    arrays = {dtype: jnp.ones(shape, dtype) for dtype in taken}
    for dtype, result in jax.jit(lambda xs: {name: call(x) for name, x in xs.items()})(arrays).items():
        for leaf in jax.tree.leaves(result):
            assert jnp.isfinite(leaf.astype(jnp.float32)).all(), dtype
    for dtype in (name for name in DTYPES if name not in taken):
        with jax.enable_x64(dtype == "float64"):  # JAX has no float64 without it
            array = jnp.ones(shape, dtype)
            with pytest.raises((ValueError, TypeError), match=dtype) as caught:
                jax.jit(call)(array)
            assert "\n" not in str(caught.value)


@pytest.mark.extended
@pytest.mark.parametrize("name", FLOAT_INPUTS)
def test_float_input_dtypes(name: str) -> None:
    make, shape = FLOAT_INPUTS[name]
    call = make()
    check(call, shape, FLOATS)


@pytest.mark.extended
def test_vision_transformer_dtypes() -> None:
    config = VisionTransformerConfig.from_dict(
        {
            "image_size": 8,
            "patch_size": 4,
            "num_classes": 3,
            "hidden_size": 16,
            "ffn_size": 16,
            "num_layers": 1,
            "num_heads": 2,
        }
    )
    call = module(VisionTransformer(config), IMAGES)
    check(call, IMAGES, FLOATS)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_id_dtypes(stored: str) -> None:
    embedding = Embedding(32, 64, stored, "float32", 0.02)
    table = {"params": {"embedding": jnp.ones((32, 64), stored)}}
    check(lambda ids: embedding.apply(table, ids), (2, 3), INTEGERS)


def test_token_dtypes_of_a_transformer() -> None:
    call = module(Transformer(CONFIG), (1, 3), "int32")
    check(call, (1, 3), INTEGERS)


def test_half_precision_input_equals_the_same_values_in_float32() -> None:
    """Half precision is rounded only at input and output."""
    layer = BitLinear(48, RECIPES["bitnet_b158"])
    x = jax.random.normal(jax.random.key(1), ROWS)
    variables = layer.init(jax.random.key(0), x)
    for dtype in FLOATS:
        y = layer.apply(variables, x.astype(dtype))
        assert y.dtype == dtype
        expected = layer.apply(variables, x.astype(dtype).astype(jnp.float32)).astype(dtype)
        np.testing.assert_array_equal(y, expected)
