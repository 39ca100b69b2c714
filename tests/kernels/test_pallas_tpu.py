"""The TPU kernel, interpreted on the CPU: exact for every format, shape and group size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from bitnet_kernels import FORMATS, PackedArray, pack, pallas_tpu, reference, relayout

TPU_FORMATS = [name for name, form in FORMATS.items() if pallas_tpu.LAYOUT in form.layouts]


def random_product(
    format: str, m: int, n: int, k: int, groups: int, seed: int
) -> tuple[jax.Array, PackedArray]:
    """Codes of activations [m, k], with values at the limits of int8, and a packed matrix [n, k]."""
    random = np.random.default_rng(seed)
    codes = random.choice(np.array(FORMATS[format].values, np.int8), (n, k))
    scale = random.uniform(0.1, 2.0, (n, groups)).astype(np.float32)
    x = random.integers(-128, 128, (m, k), np.int8)
    x[m // 2] = random.choice(np.array([-128, 127], np.int8), k)
    return jnp.asarray(x), pack(codes, scale, format, pallas_tpu.LAYOUT)


def assert_equals_reference(x: jax.Array, w: PackedArray, **options) -> None:
    @jax.jit  # a single program: without jit, every operation of the reference would be compiled for every shape
    def run(x: jax.Array, w: PackedArray) -> tuple[tuple[jax.Array, jax.Array], ...]:
        kernels = pallas_tpu.integer_matmul(x, w, **options), pallas_tpu.scaled_matmul(x, w, **options)
        return kernels, (reference.integer_matmul(x, w), reference.scaled_matmul(x, w))

    (sums, y), (expected_sums, expected_y) = run(x, w)
    assert sums.dtype == np.int32
    np.testing.assert_array_equal(sums, expected_sums)
    np.testing.assert_array_equal(y, expected_y)


@settings(max_examples=15, deadline=None)  # every new shape compiles
@given(
    st.sampled_from(TPU_FORMATS),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(1, 700),
    st.integers(0, 2**32 - 1),
)
def test_one_scale_per_output(format: str, m: int, n: int, k: int, seed: int) -> None:
    assert_equals_reference(*random_product(format, m, n, k, 1, seed), interpret=True)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(TPU_FORMATS),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([32, 64, 96, 128, 256, 544]),
    st.integers(2, 5),
    st.integers(0, 2**32 - 1),
)
def test_scale_groups(format: str, m: int, n: int, size: int, groups: int, seed: int) -> None:
    assert_equals_reference(*random_product(format, m, n, size * groups, groups, seed), interpret=True)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("format", TPU_FORMATS)
def test_several_blocks_of_rows_and_outputs(format: str) -> None:
    assert_equals_reference(*random_product(format, 600, 1100, 1100, 1, 0), interpret=True)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize(("format", "groups"), [("binary", 1), ("ternary2", 1), ("ternary2", 3)])
def test_the_simulator_detects_no_race(format: str, groups: int) -> None:
    options = pltpu.InterpretParams(detect_races=True)
    assert_equals_reference(*random_product(format, 70, 700, 384, groups, 0), interpret=options)


def test_float_input_is_quantized_first() -> None:
    _, w = random_product("ternary2", 1, 70, 300, 1, 0)
    x = jax.random.normal(jax.random.key(0), (5, 300))
    (y,) = pallas_tpu.scaled_matmuls(x, (w,), interpret=True)
    np.testing.assert_array_equal(y, reference.scaled_matmuls(x, (relayout(w, "panel16"),))[0])


def test_vmap_over_rows_and_over_matrices() -> None:
    x, w = random_product("binary", 6, 40, 130, 1, 0)
    expected = reference.integer_matmul(x, w)
    rows = x.reshape(2, 3, 130)
    y = jax.vmap(lambda x: pallas_tpu.integer_matmul(x, w, interpret=True))(rows)
    np.testing.assert_array_equal(y.swapaxes(0, 1).reshape(1, 6, 40), expected)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), w)
    y = jax.vmap(lambda w: pallas_tpu.integer_matmul(x, w, interpret=True))(two)
    np.testing.assert_array_equal(y[0], expected)
    np.testing.assert_array_equal(y[1], reference.integer_matmul(x, jax.tree.map(lambda leaf: leaf[1], two)))


def test_too_many_inputs_are_rejected_with_the_reason() -> None:
    w = jax.eval_shape(lambda: pack(jnp.ones((128, 2**16), jnp.int8), jnp.ones((1, 1)), "int8", "column"))
    assert "do not fit the on-chip memory" in pallas_tpu.obstacle(w)
    with pytest.raises(NotImplementedError, match="65536 inputs do not fit 16 MiB"):
        jax.eval_shape(pallas_tpu.integer_matmul, jnp.ones((1, 2**16), jnp.int8), w)
