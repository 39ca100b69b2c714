"""NaN, infinity, overflow, subnormals and -0.0 in every operand of every operation.

Every implementation and instruction set must agree: a NaN that a row depends on makes the whole row NaN, no row
depends on another, and products of packed matrices are bit-identical.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import (
    FORMATS,
    bfloat16_logits,
    bfloat16_rows,
    cached_attention,
    cpu,
    exact_top_logits,
    head_bounds,
    pack,
    packed_matmul,
    packed_matmuls,
)
from bitnet_kernels.reference import absmax, quantize_activations, rounded_product, scaled_matmuls

pytestmark = pytest.mark.optimized

F32 = np.float32
SPECIAL = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, -1e-40, -0.0]
# Small shapes, and shapes whose reductions XLA splits, where its maximum drops NaN.
SHAPES = [(1, 64), (3, 128), (64, 640)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(F32)


def with_special(x: np.ndarray, value: float) -> tuple[np.ndarray, np.ndarray]:
    """x with the value once in some rows, at the first, a middle and the last position; and which rows, bool [m]."""
    x, touched = x.copy(), np.zeros(len(x), bool)
    for row, column in {len(x) - 1: -1, len(x) // 2: x.shape[1] // 2, 0: 0}.items():
        x[row, column], touched[row] = value, True
    return x, touched


def bits_without_nan(x: jax.Array) -> np.ndarray:
    """The bits of float32 numbers, with one canonical NaN, since sign and payload of a NaN are irrelevant."""
    return np.where(np.isnan(x), 0x7FC00000, np.asarray(x).view(np.uint32))


def run_all(monkeypatch: pytest.MonkeyPatch, operation: Callable[..., jax.Array], *operands) -> dict:
    """name -> result of operation(*operands, implementation=...) for the reference and each instruction set."""
    results = {"reference": operation(*operands, implementation="reference")}
    for isa in cpu.available_isas():
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
        results[isa] = operation(*operands, implementation="cpu")
    return {name: jax.block_until_ready(y) for name, y in results.items()}


@pytest.mark.extended(after=8)
@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_activations(shape: tuple[int, int], value: float) -> None:
    x, touched = with_special(normal(*shape), value)
    for quantize in (quantize_activations, jax.jit(quantize_activations)):
        codes, scale = quantize(jnp.asarray(x))
        assert not np.asarray(codes)[touched].any() or np.isfinite(value)
        wrong = ~np.isfinite(np.asarray(scale)[:, 0])
        np.testing.assert_array_equal(wrong, touched & ~np.isfinite(value))
        assert np.isnan(value) == np.isnan(scale).any()
    for largest in (absmax, jax.jit(absmax)):
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(largest(jnp.asarray(x)), np.abs(x).max(axis=-1))


@pytest.mark.extended(after=1)
@pytest.mark.parametrize(("shape", "groups"), [((1, 64), 2), ((3, 128), 1), ((64, 640), 2)])
def test_packed_products(shape: tuple[int, int], groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (m, k), n = shape, 33
    scale = normal(n, groups, seed=1)
    random = np.random.default_rng(2)
    codes = {name: random.choice(np.array(form.values, np.int8), (n, k)) for name, form in FORMATS.items()}
    for name, c in codes.items():  # sums that are 0, times negative scales
        codes[name] = c if name == "binary" else np.where(np.arange(n)[:, None] < 3, 0, c).astype(np.int8)
    minimum = normal(n, groups, seed=4)
    ws = [
        pack(c, scale, name, minimum=minimum if FORMATS[name].has_minimum else None)
        for name, c in codes.items()
    ]
    for value in SPECIAL:
        x, touched = with_special(normal(m, k), value)
        results = run_all(
            monkeypatch, lambda x, **named: np.stack(packed_matmuls(x, ws, **named)), jnp.asarray(x)
        )
        expected = results.pop("reference")
        lost = np.isnan(expected).all(axis=(0, 2))
        np.testing.assert_array_equal(lost, touched & ~np.isfinite(value))
        np.testing.assert_array_equal(np.isnan(expected).any(axis=(0, 2)), lost)
        results["without jit"] = np.stack(scaled_matmuls(jnp.asarray(x), ws))
        for name, y in results.items():
            np.testing.assert_array_equal(bits_without_nan(y), bits_without_nan(expected), err_msg=name)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_packed_products_of_special_scales(dtype: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, k = 5, 40, 128
    codes = np.random.default_rng(3).integers(-1, 2, (n, k)).astype(np.int8)
    sound = pack(codes, np.abs(normal(n, groups)) + 1, "ternary2")
    x = normal(m, k) * 100
    x = jnp.asarray(x.astype(np.int8) if dtype == "int8" else x)
    for value in SPECIAL:
        scale, touched = with_special(normal(n, groups, seed=1), value)
        w = dataclasses.replace(sound, scale=jnp.asarray(scale))
        results = run_all(monkeypatch, lambda x, w, **named: packed_matmul(x, w, **named), x, w)
        expected = results.pop("reference")
        if np.isnan(value):
            np.testing.assert_array_equal(np.isnan(expected), np.broadcast_to(touched, (m, n)))
        if abs(value) > 1e38:
            assert np.isinf(expected).any()
        for name, y in results.items():
            np.testing.assert_array_equal(bits_without_nan(y), bits_without_nan(expected), err_msg=name)


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_only_products(shape: tuple[int, int], value: float) -> None:
    x, touched = with_special(normal(*shape), value)
    w = pack(np.ones((20, shape[1]), np.int8), np.ones((1, 1), F32), "ternary2")
    y = np.asarray(packed_matmul(jnp.asarray(x), w, activation_bits=None))
    np.testing.assert_array_equal(np.isfinite(y).all(axis=1), ~(touched & ~np.isfinite(value)))
    assert np.isnan(value) == np.isnan(y).any()


def test_rounded_product_equals_the_product() -> None:
    values, scale = np.array([*SPECIAL, 1.0], F32), F32(2)
    with np.errstate(over="ignore"):
        expected = (
            np.where(np.abs(values) < 1e-38, 0, values) * scale
        )  # XLA's threads flush subnormal numbers
    for product in (rounded_product, jax.jit(rounded_product)):
        np.testing.assert_array_equal(product(jnp.asarray(values), jnp.asarray(scale)), expected)


@pytest.mark.extended(after=1)
@pytest.mark.skipif(
    cpu.unavailable() is not None, reason="the order of XLA's sums is its own: nothing to compare"
)
@pytest.mark.parametrize("shape", [(1, 64), (64, 640)])
def test_heads_with_special_values(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    (m, k), n = shape, 50
    table = jnp.asarray(normal(n, k, seed=1), jnp.bfloat16)
    copy = pack(*int8_copy(np.asarray(table, F32)), "int8")
    bounds = head_bounds(table, copy)
    sound = np.asarray(bfloat16_logits(jnp.asarray(normal(m, k)), table, implementation="cpu"))
    for value in SPECIAL:
        x, touched = with_special(normal(m, k), value)
        results = run_all(monkeypatch, lambda x, **named: bfloat16_logits(x, table, **named), jnp.asarray(x))
        for y in results.values():
            np.testing.assert_array_equal(np.isnan(y).any(axis=1), touched & np.isnan(value))
            np.testing.assert_array_equal(np.isnan(y).all(axis=1), touched & np.isnan(value))
            np.testing.assert_array_equal(np.isinf(y).all(axis=1), touched & np.isinf(value))
        for isa in cpu.available_isas():
            whole = np.asarray(results[isa])
            np.testing.assert_array_equal(bits_without_nan(whole), bits_without_nan(results["scalar"]))
            np.testing.assert_array_equal(whole[~touched], sound[~touched])

            monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
            exact = exact_top_logits(jnp.asarray(x), table, copy, bounds, 1, implementation="cpu")
            got = np.asarray(exact.logits)
            known = ~np.isneginf(got) | np.isneginf(whole)
            np.testing.assert_array_equal(bits_without_nan(got[known]), bits_without_nan(whole[known]))
            assert known[touched].all() or np.isfinite(value)
            sure = ~np.isnan(whole).any(axis=1)
            np.testing.assert_array_equal(got[sure].max(axis=1), whole[sure].max(axis=1))


def int8_copy(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(table).max(axis=1, keepdims=True) / F32(127)
    return np.round(table / scale).astype(np.int8), scale


@pytest.mark.extended(after=1)
@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ kernels to find candidates")
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, -0.0])
def test_rows_and_bounds_of_special_tables(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values, touched = with_special(normal(60, 640), value)
    table = jnp.asarray(values, jnp.bfloat16)
    rows = bfloat16_rows(table, jnp.arange(-1, 61))
    assert np.isnan(rows[0]).all()
    assert np.isnan(rows[-1]).all()
    np.testing.assert_array_equal(
        bits_without_nan(rows[1:-1]), bits_without_nan(np.asarray(table).astype(F32))
    )
    # The copy does not contain the special value, so only the bounds keep its row among the candidates.
    copy = pack(*int8_copy(normal(60, 640)), "int8")
    x, bounds = jnp.asarray(normal(3, 640, seed=5)), head_bounds(table, copy)
    for isa in cpu.available_isas():
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
        whole = np.asarray(bfloat16_logits(x, table, implementation="cpu"))
        got = np.asarray(exact_top_logits(x, table, copy, bounds, 1, implementation="cpu").logits)
        special = touched[None] & ~np.isfinite(whole)
        np.testing.assert_array_equal(got[special], whole[special])


# --- attention: queries 0 ... 3 see keys up to their own position, but never key 1; key 9 is not written

T, S, H, K, LENGTH = 4, 10, 4, 2, 9


def attention_case(kv: str, h: int, room: int) -> dict[str, np.ndarray]:
    """Operands of a batch of two; `room` positions, the first of which are padding that no query sees."""
    past = room - S
    visible = np.zeros((2, T, room), bool)
    visible[:, :, past:] = np.arange(S)[None, None] <= (np.arange(T) + LENGTH - T)[None, :, None]
    visible[:, :, past + 1] = False
    case = {"q": normal(2, T, H, h), "visible": visible}
    for name, seed in (("k", 1), ("v", 2)):
        case[name] = normal(2, room, K, h, seed=seed)
        if kv == "int8":
            case[name] = np.round(case[name] * 30).astype(np.int8)
            case[f"{name}_scale"] = np.abs(normal(2, room, K, seed=seed)) + F32(0.5)
    return case


def attend(case: dict[str, np.ndarray], kv: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    room = case["visible"].shape[-1]
    arrays = {name: jnp.asarray(x) for name, x in case.items()}
    if kv == "bfloat16":
        arrays |= {name: arrays[name].astype(jnp.bfloat16) for name in ("k", "v")}

    def operation(implementation: str) -> jax.Array:
        return cached_attention(scale=0.3, length=room - S + LENGTH, implementation=implementation, **arrays)

    results = {name: np.asarray(y) for name, y in run_all(monkeypatch, operation).items()}
    isas = [results[name] for name in cpu.available_isas()]
    for y in isas:
        np.testing.assert_array_equal(bits_without_nan(y), bits_without_nan(isas[0]))
    return results


@pytest.mark.extended(after=6)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("h", "room"), [(20, S), (16, 300)])  # one chunk of keys, several
@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8"])
def test_special_values_reach_exactly_the_queries_that_see_them(
    kv: str, h: int, room: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = attend(attention_case(kv, h, room), kv, monkeypatch)
    operands = ["q", "k_scale", "v_scale"] if kv == "int8" else ["q", "k", "v"]
    hidden, unwritten, seen_by_last = room - S + 1, room - 1, room - S + LENGTH - 1
    for name in operands:
        for position in (1,) if name == "q" else (0, hidden, unwritten, seen_by_last):
            case = attention_case(kv, h, room)
            if name in ("q", "k", "v"):
                case[name][1, position, 1, h - 3] = value  # head 1 of q, kv head 1 of k and v
            else:
                case[name][1, position, 1] = value
            touched = np.zeros((2, T, H), bool)
            if name == "q":
                touched[1, position, 1] = True
            elif position == seen_by_last:
                touched[1, T - 1, H // K :] = True
            elif position == 0 and room == S:
                touched[1, :, H // K :] = True
            # A key with an infinite score may have zero weight; everything else that is visible propagates.
            shown = np.isnan(value) or name in ("v", "v_scale")
            for which, y in attend(case, kv, monkeypatch).items():
                if shown:
                    assert not np.isfinite(y[touched]).all(axis=-1).any(), (name, position, which)
                if np.isnan(value) and name != "v":
                    assert np.isnan(y[touched]).all(), (name, position, which)
                # XLA may sum in a different order in another program.
                np.testing.assert_allclose(
                    y[~touched], sound[which][~touched], rtol=2e-6, atol=2e-6, err_msg=f"{name} {which}"
                )


@pytest.mark.parametrize("scores", [3e38, -3e38, np.inf, -np.inf])
def test_scores_that_overflow(scores: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All +inf or -inf: the softmax is NaN in every implementation; other queries are unaffected."""
    case = attention_case("float32", 16, S)
    case["q"][0, 1] = 1.0
    case["k"][0] = 1.0
    case["q"][0, 1, :, 0] = scores
    case["k"][0, :, :, 0] = 100.0
    for which, y in attend(case, "float32", monkeypatch).items():
        assert np.isnan(y[0, 1]).all(), which
        assert np.isfinite(np.delete(y[0], 1, axis=0)).all(), which
        assert np.isfinite(y[1]).all(), which


def test_fully_masked_queries_are_zero_whatever_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    for kv in ("float32", "bfloat16"):
        case = attention_case(kv, 16, S)
        case["visible"][:] = False
        case["k"][:], case["v"][:] = np.nan, np.nan
        for which, y in attend(case, kv, monkeypatch).items():
            np.testing.assert_array_equal(y, np.zeros_like(y), err_msg=which)
