"""packed_matmul: values, gradients and JAX transformations, with and without the C++ kernels."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from bitnet_kernels import (
    FORMATS,
    PackedArray,
    choose_implementation,
    cpu,
    dequantize,
    for_platform,
    packed_matmul,
    reference,
    relayout,
    unpack,
)

AVAILABLE = ["reference"] if cpu.unavailable() else ["cpu", "reference"]  # on this platform
P = PartitionSpec


def activations(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(params=AVAILABLE)
def multiply(request: pytest.FixtureRequest):
    """packed_matmul with each available implementation."""
    return functools.partial(packed_matmul, implementation=request.param)


@pytest.mark.extended(after=len(FORMATS))
@pytest.mark.optimized
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("groups", [1, 3])
def test_values(make_packed, multiply, format: str, groups: int) -> None:
    codes, w = make_packed(format, 37, 96, groups)
    x = activations(2, 3, 96)
    y = multiply(x, w)
    assert (y.shape, y.dtype) == ((2, 3, 37), np.float32)

    q, s = (np.asarray(a) for a in reference.quantize_activations(x))
    expected = np.zeros((2, 3, 37), np.float32)
    for g, part in enumerate(np.split(np.arange(96), groups)):
        sums = q[..., part].astype(np.int32) @ codes[:, part].T.astype(np.int32)
        term = sums.astype(np.float32) * np.asarray(w.scale)[:, g]
        if w.minimum is not None:
            x_sums = q[..., part].sum(axis=-1, keepdims=True, dtype=np.int32)
            term = term + x_sums.astype(np.float32) * np.asarray(w.minimum)[:, g]
        expected = expected + term
    np.testing.assert_array_equal(y, expected * s)
    np.testing.assert_array_equal(jax.jit(multiply)(x, w), expected * s)

    # int8 rounding: half a step of scale s per input, in the worst case all in one direction
    float_y = x @ dequantize(w).T
    bound = 0.51 * s * np.abs(dequantize(w)).sum(1)
    assert (np.abs(y - float_y) <= bound).all()


def test_int8_input_is_taken_as_codes(make_packed, multiply) -> None:
    codes, w = make_packed("ternary2", 37, 64, 2)
    x = np.random.default_rng(0).integers(-128, 128, (5, 64), np.int8)
    sums = reference.integer_matmul(jnp.asarray(x), w)
    for bits in (8, None):
        y = multiply(jnp.asarray(x), w, activation_bits=bits)
        np.testing.assert_array_equal(y, reference.rescale(sums, w.scale))


@pytest.mark.optimized
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("groups", [1, 3])
def test_16_bit_input(make_packed, multiply, format: str, groups: int) -> None:
    codes, w = make_packed(format, 37, 96, groups)
    x = activations(2, 3, 96)
    y = multiply(x, w, activation_bits=16)
    np.testing.assert_array_equal(jax.jit(functools.partial(multiply, activation_bits=16))(x, w), y)

    q, s = (np.asarray(a) for a in reference.quantize_activations(x, 16))
    assert q.dtype == np.int16
    assert np.abs(q).max() == reference.PEAK_16
    np.testing.assert_array_equal(multiply(jnp.asarray(q), w, activation_bits=16) * s, y)
    exact = (q.astype(np.float64) * s) @ np.asarray(dequantize(w), np.float64).T
    size = np.abs(q * s) @ np.abs(np.asarray(dequantize(w))).T
    # roundings to float32: of a scaled sum and of a sum of groups for each digit, of their sum, of the last product
    assert (np.abs(y - exact) <= (2 * groups + 2) * 2.0**-23 * size).all()
    # half a step of scale s per input, in the worst case all in one direction
    bound = 0.51 * s * np.abs(dequantize(w)).sum(1)
    assert (np.abs(y - x @ dequantize(w).T) <= bound + 1e-5).all()


def test_digits_are_int8_and_give_back_every_16_bit_code() -> None:
    codes = np.arange(-reference.PEAK_16, reference.PEAK_16 + 1, dtype=np.int16)
    high, low = (np.asarray(digit) for digit in reference.digits(jnp.asarray(codes)))
    assert np.minimum(high, low).min() >= -128
    assert np.maximum(high, low).max() <= 127
    np.testing.assert_array_equal(256 * high + low, codes)
    np.testing.assert_array_equal(reference.join_digits(high, low), codes)


def test_the_gradient_of_16_bit_input_is_straight_through(make_packed, multiply) -> None:
    _, w = make_packed("int4", 37, 64, 2)
    x, dy = activations(5, 64), activations(5, 37)
    dx = jax.vjp(lambda x: multiply(x, w, activation_bits=16), x)[1](dy)[0]
    np.testing.assert_allclose(dx, dy @ dequantize(w), rtol=1e-5, atol=1e-5)


def test_int16_input_is_taken_as_codes(make_packed, multiply) -> None:
    _, w = make_packed("ternary2", 37, 64, 2)
    x = jnp.asarray(np.random.default_rng(0).integers(-32512, 32513, (5, 64)).astype(np.int16))
    for bits in (16, None):
        y = multiply(x, w, activation_bits=bits)
        np.testing.assert_allclose(y, x.astype(np.float32) @ dequantize(w).T, rtol=1e-5, atol=1)


@pytest.mark.parametrize("groups", [1, 2])
def test_weight_only(make_packed, groups: int) -> None:
    _, w = make_packed("ternary2", 37, 64, groups)
    x = activations(5, 64)
    y = packed_matmul(x, w, activation_bits=None)
    # float32 sums of 64 terms of magnitude 2 in a different order
    np.testing.assert_allclose(y, x @ dequantize(w).T, atol=1e-5)
    dx = jax.grad(lambda x: (packed_matmul(x, w, activation_bits=None) ** 2).sum())(x)
    np.testing.assert_allclose(dx, 2 * y @ dequantize(w), atol=1e-4)  # sums of 37 terms of magnitude 30
    with pytest.raises(NotImplementedError, match="no product of float activations"):
        packed_matmul(x, w, activation_bits=None, implementation="cpu")


@pytest.mark.extended(after=1)
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_is_converted_to_float32(make_packed, multiply, dtype) -> None:
    _, w = make_packed("binary", 20, 40)
    x = activations(3, 40).astype(dtype)
    np.testing.assert_array_equal(multiply(x, w), multiply(x.astype(jnp.float32), w))
    assert jax.grad(lambda x: multiply(x, w).sum())(x).dtype == dtype


def test_vector_input_and_zero_rows(make_packed, multiply) -> None:
    _, w = make_packed("binary", 20, 40)
    x = activations(40)
    np.testing.assert_array_equal(multiply(x, w), multiply(x[None], w)[0])
    assert multiply(jnp.zeros((0, 40)), w).shape == (0, 20)


@pytest.mark.extended(after=len(FORMATS))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("groups", [1, 3])
def test_gradient_goes_straight_through_to_x(make_packed, multiply, format: str, groups: int) -> None:
    _, w = make_packed(format, 37, 96, groups)
    x, dy = activations(2, 3, 96), activations(2, 3, 37, seed=1)
    _, pullback = jax.vjp(lambda x: multiply(x, w), x)
    expected = dy.reshape(6, 37) @ dequantize(w)
    # the same float32 product in another shape may sum in a different order
    np.testing.assert_allclose(pullback(dy)[0].reshape(6, 96), expected, atol=1e-5)
    grads = jax.jit(jax.grad(lambda x, w: multiply(x, w).sum(), argnums=1, allow_int=True))(x, w)
    assert grads.codes.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(grads.scale, np.zeros_like(w.scale))


def test_vmap_of_x_equals_a_loop(make_packed, multiply) -> None:
    _, w = make_packed("ternary2", 37, 64, 2)
    x = activations(3, 4, 5, 64)
    expected = multiply(x, w)
    np.testing.assert_array_equal(jax.vmap(multiply, (0, None))(x, w), expected)
    nested = jax.vmap(jax.vmap(multiply, (0, None)), (1, None), 1)
    np.testing.assert_array_equal(jax.jit(nested)(x, w), expected)
    per_token = jax.vmap(jax.vmap(jax.vmap(multiply, (0, None)), (0, None)), (0, None))
    np.testing.assert_array_equal(per_token(x, w), expected)


def test_vmap_of_the_gradient(make_packed, multiply) -> None:
    _, w = make_packed("binary", 37, 64)
    x = activations(3, 4, 64)
    gradient = jax.grad(lambda x, w: (multiply(x, w) ** 2).sum())
    expected = jnp.stack([gradient(row, w) for row in x])
    # float32 matmuls of other shapes may sum in a different order; sums of 37 terms of magnitude 20
    np.testing.assert_allclose(jax.vmap(gradient, (0, None))(x, w), expected, atol=1e-4)


def stack(*matrices: PackedArray) -> PackedArray:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices)


def test_vmap_of_w(make_packed, multiply) -> None:
    matrices = [make_packed("ternary2", 37, 64, seed=seed)[1] for seed in range(3)]
    x = activations(3, 4, 64)
    shared = jax.vmap(multiply, (None, 0))(x[0], stack(*matrices))
    np.testing.assert_array_equal(shared, jnp.stack([multiply(x[0], w) for w in matrices]))
    own = jax.jit(jax.vmap(multiply))(x, stack(*matrices))
    np.testing.assert_array_equal(own, jnp.stack([multiply(a, w) for a, w in zip(x, matrices, strict=True)]))
    nested = jax.vmap(jax.vmap(multiply, (0, None)), (None, 0))(x, stack(*matrices))
    np.testing.assert_array_equal(nested, jnp.stack([multiply(x, w) for w in matrices]))


def test_vmap_of_codes_or_of_scales_alone(make_packed, multiply) -> None:
    matrices = [make_packed("ternary2", 37, 64, seed=seed)[1] for seed in range(3)]
    x, first, stacked = activations(4, 64), matrices[0], stack(*matrices)

    of_codes = jax.vmap(lambda codes: multiply(x, dataclasses.replace(first, codes=codes)))(stacked.codes)
    expected = [multiply(x, dataclasses.replace(w, scale=first.scale)) for w in matrices]
    np.testing.assert_array_equal(of_codes, jnp.stack(expected))
    of_scales = jax.vmap(lambda scale: multiply(x, dataclasses.replace(first, scale=scale)))(stacked.scale)
    expected = [multiply(x, dataclasses.replace(first, scale=w.scale)) for w in matrices]
    np.testing.assert_array_equal(of_scales, jnp.stack(expected))


def test_scan_over_layers_and_while_loop(make_packed, multiply) -> None:
    matrices = [make_packed("binary", 64, 64, seed=seed)[1] for seed in range(3)]
    x = activations(2, 64)
    expected = x
    for w in matrices:
        expected = jnp.tanh(multiply(expected, w))
    scanned, _ = jax.lax.scan(lambda x, w: (jnp.tanh(multiply(x, w)), None), x, stack(*matrices))
    np.testing.assert_allclose(scanned, expected, atol=1e-6)  # tanh with and without jit differs by an ulp

    @jax.jit
    def repeat(x: jax.Array, w: PackedArray) -> jax.Array:
        def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return state[0] + 1, 0.01 * multiply(state[1], w)

        return jax.lax.while_loop(lambda state: state[0] < 3, step, (jnp.int32(0), x))[1]

    expected = x
    for _ in range(3):
        expected = 0.01 * multiply(expected, matrices[0])
    np.testing.assert_allclose(
        repeat(x, matrices[0]), expected, rtol=1e-5
    )  # 0.01 may be fused into the scales


def test_donation(make_packed, multiply) -> None:
    _, w = make_packed("ternary2", 64, 64)
    x = activations(5, 64)
    expected = multiply(x, w)
    np.testing.assert_array_equal(jax.jit(multiply, donate_argnums=0)(x, w), expected)
    assert x.is_deleted()


def test_shard_map_over_outputs_and_over_inputs(make_packed, multiply) -> None:
    _, w = make_packed("ternary2", 64, 128)
    x = np.random.default_rng(0).integers(-128, 128, (5, 128), np.int8)
    expected = multiply(jnp.asarray(x), w)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    def outputs(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return multiply(x, PackedArray(codes, scale, w.format, w.layout, (32, 128)))

    def inputs(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.lax.psum(multiply(x, PackedArray(codes, scale, w.format, w.layout, (64, 64))), "d")

    by_outputs = jax.shard_map(outputs, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P(None, "d"))
    by_inputs = jax.shard_map(inputs, mesh=mesh, in_specs=(P(None, "d"), P(None, "d"), P()), out_specs=P())
    np.testing.assert_array_equal(jax.jit(by_outputs)(x, w.codes, w.scale), expected)
    # two partial sums are scaled and rounded before they are added
    np.testing.assert_allclose(jax.jit(by_inputs)(x, w.codes, w.scale), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.extended(after=len(FORMATS))
@pytest.mark.optimized
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"),
    # slow: one whole panel, which test_cpu.py has for every instruction set
    [(1, 100, 130, 1), (7, 33, 256, 4), pytest.param(2, 16, 32, 1, marks=pytest.mark.slow)],
)
def test_all_implementations_are_bit_identical(
    make_packed, format: str, m: int, n: int, k: int, groups: int
) -> None:
    _, w = make_packed(format, n, k, groups)
    x = activations(m, k)
    expected = packed_matmul(x, w, implementation="reference")
    for name in (None, *AVAILABLE):
        y = functools.partial(packed_matmul, implementation=name)
        np.testing.assert_array_equal(y(x, w), expected, err_msg=str(name))
        np.testing.assert_array_equal(jax.jit(y)(x, w), expected, err_msg=str(name))


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (
            jnp.ones((2, 63)),
            {},
            r"x has shape \(2, 63\); expected \(..., 64\) for a matrix of shape \(37, 64\)",
        ),
        (jnp.ones(()), {}, r"x has shape \(\)"),
        (jnp.ones((2, 64), jnp.int32), {}, "x is int32; expected a float type, or int8 or int16"),
        (jnp.ones((2, 64), jnp.uint8), {}, "x is uint8"),
        (
            jnp.ones((2, 64)),
            {"activation_bits": 4},
            "activation_bits=4; expected None or one of 8, 16 for float32",
        ),
        (jnp.ones((2, 64)), {"activation_bits": 1}, "activation_bits=1; expected None or one of 8, 16"),
        (jnp.ones((2, 64), jnp.int8), {"activation_bits": 16}, "expected None or one of 8, 1 for int8 x"),
        (jnp.ones((2, 64), jnp.int16), {}, "activation_bits=8; expected None or one of 16 for int16 x"),
        (jnp.ones((2, 64)), {"implementation": "cuda"}, "implementation='cuda'; expected None or one of"),
    ],
)
def test_errors_name_the_invalid_input(make_packed, x: jax.Array, arguments: dict, message: str) -> None:
    _, w = make_packed("binary", 37, 64)
    with pytest.raises(ValueError, match=message):
        packed_matmul(x, w, **arguments)


def test_errors_name_an_invalid_matrix_even_under_jit(make_packed) -> None:
    _, w = make_packed("binary", 37, 64)
    broken = PackedArray(w.codes[:1], w.scale, w.format, w.layout, w.shape)
    with pytest.raises(ValueError, match=r"uint8\[1, 2, 64\]; expected uint8\[3, 2, 64\]"):
        jax.jit(packed_matmul)(jnp.ones((1, 64)), broken)


def test_the_choice_states_its_reason(make_packed) -> None:
    _, w = make_packed("binary", 37, 64)
    assert choose_implementation(w, "gpu")[:2] == ("reference", None)
    assert (
        "layout 'panel16' is for platform 'cpu'; call relayout(w, 'plane')"
        in choose_implementation(w, "gpu").reason
    )
    assert choose_implementation(w) == choose_implementation(w, "cpu")
    if cpu.unavailable() is None:
        choice = choose_implementation(w)
        assert (choice.name, choice.isa) == ("cpu", cpu.isa())
        assert cpu.isa() in choice.reason


def test_the_cpu_custom_call_is_lowered_only_for_cpu(make_packed) -> None:
    if cpu.unavailable() is not None:
        pytest.skip(f"no C++ kernels: {cpu.unavailable()}")
    _, w = make_packed("binary", 37, 64)
    traced = jax.jit(packed_matmul).trace(jnp.ones((2, 64)), w)
    target = "bitnet_kernels_scaled_matmul"
    assert target in traced.lower().as_text()
    assert target not in traced.lower(lowering_platforms=("tpu",)).as_text()
    ordered = jax.jit(functools.partial(packed_matmul, implementation="cpu")).trace(jnp.ones((2, 64)), w)
    with pytest.raises(NotImplementedError, match="tpu"):
        ordered.lower(lowering_platforms=("tpu",))


@pytest.mark.filterwarnings("ignore:packed_matmul runs on XLA")
def test_the_tpu_kernel_is_lowered_only_for_tpu(make_packed) -> None:
    _, w = make_packed("ternary2", 256, 512)
    w = relayout(w, "column")
    assert choose_implementation(w, "tpu")[:2] == ("tpu", None)
    traced = jax.jit(packed_matmul).trace(jnp.ones((2, 512)), w)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    np.testing.assert_array_equal(
        packed_matmul(activations(2, 512), w), packed_matmul(activations(2, 512), relayout(w, "panel16"))
    )
    ordered = jax.jit(functools.partial(packed_matmul, implementation="tpu")).trace(jnp.ones((2, 512)), w)
    with pytest.raises(NotImplementedError, match="cpu"):
        ordered.lower()


@pytest.mark.filterwarnings("ignore:packed_matmul runs on XLA")
def test_the_tpu_kernel_lowers_with_scale_groups(make_packed) -> None:
    _, w = make_packed("binary", 256, 512, groups=8)
    traced = jax.jit(packed_matmul).trace(jnp.ones((2, 512)), relayout(w, "column"))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_errors_name_a_matrix_in_the_layout_of_another_platform(make_packed) -> None:
    _, w = make_packed("ternary2", 37, 64)
    moved = relayout(w, "column")
    cpu.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"runs on XLA.*call relayout\(w, 'panel16'\) once"):
        packed_matmul(jnp.ones((1, 64)), moved)
    with pytest.raises(NotImplementedError, match="layout 'column' is for platform 'tpu'"):
        packed_matmul(jnp.ones((1, 64)), moved, implementation="cpu")
    with pytest.raises(NotImplementedError, match="layout 'panel16' is for platform 'cpu'"):
        packed_matmul(jnp.ones((1, 64)), w, implementation="tpu")
    _, w = make_packed("ternary5", 37, 64)
    assert "ternary5 has no layout for platform 'gpu'" in choose_implementation(w, "gpu").reason


def test_a_matrix_is_converted_to_the_layout_of_the_platform(make_packed) -> None:
    codes, w = make_packed("ternary2", 37, 64)
    assert for_platform(w, "cpu") is w
    moved = for_platform(w, "tpu")
    assert (moved.layout, for_platform(moved, "cpu").layout) == ("column", "panel16")
    np.testing.assert_array_equal(unpack(moved), codes)
    _, grouped = make_packed("binary", 37, 64, groups=2)
    assert for_platform(grouped, "gpu") is grouped
    _, five = make_packed("ternary5", 37, 64)
    assert for_platform(five, "tpu") is five
