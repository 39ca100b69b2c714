"""Every public operation accepts its documented dtypes; any other is a one-line ValueError."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import (
    PackedArray,
    bfloat16_logits,
    bfloat16_rows,
    cached_attention,
    dequantize,
    exact_top_logits,
    head_bounds,
    pack,
    packed_matmul,
    packed_matmuls,
    reference_attention,
    relayout,
    sharded_matmul,
    unpack,
    validate,
)
from bitnet_kernels.dtypes import FLOATS, floats, integers
from bitnet_kernels.packed import SCALE_DTYPES
from bitnet_kernels.reference import float_matmul, quantize_activations

DTYPES = ("bool", "int8", "int32", "uint8", "uint16", "complex64", "float64", *FLOATS)
INTEGERS = ("int8", "int32", "uint8", "uint16")

CODES = np.ones((32, 64), np.int8)
SCALE = np.ones((32, 1), np.float32)
W = pack(CODES, SCALE, "int8")
TABLE = jnp.ones((32, 64), jnp.bfloat16)
X = np.ones((2, 64))
BOUNDS = head_bounds(TABLE, W)
QUERIES, KEYS = np.ones((1, 2, 2, 8)), np.ones((1, 4, 2, 8))
VISIBLE, STEPS = np.ones((1, 2, 4), bool), jnp.ones((1, 4, 2), jnp.float32)


def attention_of(function: Callable[..., jax.Array], **given: jax.Array) -> jax.Array:
    q, k = jnp.asarray(QUERIES, jnp.float32), jnp.asarray(KEYS, jnp.float32)
    arguments = {"q": q, "k": k, "v": k, "visible": jnp.asarray(VISIBLE), "scale": 1.0, "length": 4}
    return function(**arguments | given)


def with_part(part: str, array: jax.Array) -> PackedArray:
    leaves = {"codes": W.codes, "scale": W.scale} | {part: array}
    return PackedArray(format="int8", layout="panel16", shape=(32, 64), **leaves)


# operation and operand -> (function of one array, the array, its documented dtypes)
OPERANDS: dict[str, tuple[Callable[[jax.Array], object], np.ndarray, tuple[str, ...]]] = {
    "packed_matmul x": (lambda x: packed_matmul(x, W), X, (*FLOATS, "int8")),
    "packed_matmul x, weight-only": (lambda x: packed_matmul(x, W, activation_bits=None), X, (*FLOATS, "int8")),
    "packed_matmuls x": (lambda x: packed_matmuls(x, (W, W)), X, (*FLOATS, "int8")),
    "packed_matmul codes": (lambda c: packed_matmul(jnp.ones((2, 64)), with_part("codes", c)), W.codes, ("uint8",)),
    "packed_matmul scale": (lambda s: packed_matmul(jnp.ones((2, 64)), with_part("scale", s)), SCALE, SCALE_DTYPES),
    "sharded_matmul x": (
        lambda x: sharded_matmul(x, W, jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,)), "d", "inputs"),
        X, (*FLOATS, "int8"),
    ),
    "quantize_activations x": (quantize_activations, X, FLOATS),
    "float_matmul x": (lambda x: float_matmul(x, W), X, FLOATS),
    "bfloat16_logits x": (lambda x: bfloat16_logits(x, TABLE), X, FLOATS),
    "bfloat16_logits table": (lambda t: bfloat16_logits(jnp.ones((2, 64)), t), TABLE, ("bfloat16",)),
    "bfloat16_rows table": (lambda t: bfloat16_rows(t, jnp.ones(3, jnp.int32)), TABLE, ("bfloat16",)),
    "bfloat16_rows indices": (lambda i: bfloat16_rows(TABLE, i), np.ones(3), INTEGERS),
    "exact_top_logits x": (lambda x: exact_top_logits(x, TABLE, W, BOUNDS, 1), X, FLOATS),
    "exact_top_logits table": (
        lambda t: exact_top_logits(jnp.ones((2, 64)), t, W, BOUNDS, 1), TABLE, ("bfloat16",),
    ),
    "exact_top_logits bounds": (
        lambda b: exact_top_logits(jnp.ones((2, 64)), TABLE, W, b, 1), BOUNDS, ("float32",),
    ),
    "head_bounds table": (lambda t: head_bounds(t, W), TABLE, ("bfloat16",)),
    "pack codes": (lambda c: pack(c, SCALE, "int8"), CODES, ("int8",)),
    "pack scale": (lambda s: pack(CODES, s, "int8"), SCALE, SCALE_DTYPES),
    "unpack codes": (lambda c: unpack(with_part("codes", c)), W.codes, ("uint8",)),
    "dequantize scale": (lambda s: dequantize(with_part("scale", s)), SCALE, SCALE_DTYPES),
    "relayout codes": (lambda c: relayout(with_part("codes", c), "column"), W.codes, ("uint8",)),
    "validate codes": (lambda c: validate(with_part("codes", c)), W.codes, ("uint8",)),
    "floats": (lambda x: floats("x", x), X, FLOATS),
    "integers": (lambda x: integers("x", x), X, INTEGERS),
}  # fmt: skip
for _function in (cached_attention, reference_attention):
    for _name, _array, _taken in (
        ("q", QUERIES, FLOATS),
        ("visible", VISIBLE, ("bool",)),
        ("length", np.array(4), INTEGERS),
    ):
        OPERANDS[f"{_function.__name__} {_name}"] = (
            lambda x, f=_function, name=_name: attention_of(f, **{name: x}), _array, _taken,
        )  # fmt: skip
    OPERANDS[f"{_function.__name__} k and v"] = (
        lambda x, f=_function: attention_of(
            f, k=x, v=x, **({"k_scale": STEPS, "v_scale": STEPS} if x.dtype == np.int8 else {})
        ),
        KEYS, ("float32", "bfloat16", "uint16", "int8"),
    )  # fmt: skip
    OPERANDS[f"{_function.__name__} k_scale and v_scale"] = (
        lambda x, f=_function: attention_of(
            f, k=jnp.ones(KEYS.shape, jnp.int8), v=jnp.ones(KEYS.shape, jnp.int8), k_scale=x, v_scale=x
        ),
        np.ones((1, 4, 2)), ("float32",),
    )  # fmt: skip


def finite(results: object) -> bool:
    return all(bool(jnp.isfinite(jnp.asarray(leaf, jnp.float32)).all()) for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operand", OPERANDS)
def test_documented_dtypes_work_and_all_others_are_rejected(operand: str, dtype: str) -> None:
    call, values, taken = OPERANDS[operand]
    with jax.enable_x64(dtype == "float64"):  # JAX has no float64 without it
        array = jnp.asarray(np.asarray(values).astype(np.float32)).astype(dtype)
        if dtype in taken:
            assert finite(call(array))
            return
        with pytest.raises((ValueError, TypeError), match=dtype) as caught:
            call(array)
        assert "\n" not in str(caught.value)


def test_numpy_arrays_of_64_bit_types_are_converted_like_in_jax() -> None:
    np.testing.assert_array_equal(packed_matmul(X, W), packed_matmul(jnp.asarray(X, jnp.float32), W))
    np.testing.assert_array_equal(bfloat16_rows(TABLE, np.arange(3)), np.ones((3, 64)))


def test_out_of_range_indices_of_any_integer_dtype_give_nan() -> None:
    with jax.enable_x64(True):
        for index in (-1, 32, 2**31 + 1, 2**32 + 1):
            assert np.isnan(bfloat16_rows(TABLE, jnp.asarray([index], jnp.int64))).all(), index
    assert np.isnan(bfloat16_rows(TABLE, jnp.asarray([2**32 - 1, 2**31 + 1], jnp.uint32))).all()
