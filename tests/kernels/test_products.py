"""The products of training: exact sums of codes, float32 in any layout, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_kernels import FORMATS, code_matmul, cpu, float_matmul
from bitnet_kernels.processors import threads

needs_library = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}"
)
ISAS = cpu.available_isas()
EPS = 2.0**-24


def on_every_isa(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[Any]:
    """The results of run() with each instruction set in turn, slowest first."""
    results = []
    for isa in ISAS:
        monkeypatch.setenv("BITNET_KERNELS_ISA", isa)
        results.append(run())
    return results


def codes(rng: np.random.Generator, format: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random codes of a format as int8, its extremes among them."""
    values = np.array(FORMATS[format].values, np.int64)
    drawn = rng.choice(values, shape)
    drawn.flat[0], drawn.flat[-1] = values[0], values[-1]
    return drawn.astype(np.int8)


@needs_library
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"), [(1, 1, 1, 1), (3, 17, 37, 1), (40, 70, 130, 1), (9, 33, 44, 3)]
)
def test_sums_of_codes_are_exact_on_every_instruction_set(
    format: str, m: int, n: int, k: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(k)
    axes = (k,) if groups == 1 else (groups, k)
    x, w = rng.integers(-128, 128, (m, *axes)).astype(np.int8), codes(rng, format, (n, *axes))
    sums = np.einsum("mk,nk->mn" if groups == 1 else "mgk,ngk->gmn", x.astype(np.int64), w.astype(np.int64))
    for got in on_every_isa(monkeypatch, lambda: code_matmul(x, w, format, implementation="cpu")):
        np.testing.assert_array_equal(got, sums.astype(np.float32))
    for dtype in ("int8", "float32", "bfloat16"):
        reference = code_matmul(
            jnp.asarray(x), jnp.asarray(w), format, dtype=dtype, implementation="reference"
        )
        np.testing.assert_array_equal(reference, sums.astype(np.float32))


@needs_library
def test_a_sum_beyond_float32_integers_is_rounded_once() -> None:
    x, w = np.full((2, 4001), 127, np.int8), np.full((3, 4001), 126, np.int8)
    x[0, 0] = 126
    got = code_matmul(jnp.asarray(x), jnp.asarray(w), "int8", implementation="cpu")
    np.testing.assert_array_equal(got, (x.astype(np.int64) @ w.astype(np.int64).T).astype(np.float32))


@needs_library
def test_codes_that_a_format_does_not_hold_spoil_only_their_row() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (5, 64)).astype(np.int8), codes(rng, "ternary2", (33, 64))
    expected = np.asarray(code_matmul(jnp.asarray(x), jnp.asarray(w), "ternary2", implementation="cpu"))
    w[20] = rng.integers(-128, 128, 64)
    got = np.asarray(code_matmul(jnp.asarray(x), jnp.asarray(w), "ternary2", implementation="cpu"))
    np.testing.assert_array_equal(np.delete(got, 20, axis=1), np.delete(expected, 20, axis=1))


LAYOUTS = list(itertools.product((False, True), (False, True)))


def operands(
    rng: np.random.Generator, m: int, n: int, k: int, layout: tuple[bool, bool], of_codes: bool
) -> Any:
    a = rng.standard_normal((k, m) if layout[0] else (m, k)).astype(np.float32)
    b = rng.standard_normal((k, n) if layout[1] else (n, k)).astype(np.float32)
    return jnp.asarray(a), jnp.asarray(np.round(50 * b).clip(-128, 127).astype(np.int8) if of_codes else b)


def multiply(
    a: jax.Array, b: jax.Array, layout: tuple[bool, bool], implementation: str | None = "cpu"
) -> np.ndarray:
    return np.asarray(
        float_matmul(a, b, transposed_a=layout[0], transposed_b=layout[1], implementation=implementation)
    )


@needs_library
@pytest.mark.parametrize("of_codes", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=12)
@given(m=st.integers(1, 130), n=st.integers(1, 70), k=st.integers(0, 600), seed=st.integers(0, 99))
def test_float_products_are_within_rounding_and_the_same_on_every_instruction_set(
    layout: tuple[bool, bool], of_codes: bool, m: int, n: int, k: int, seed: int
) -> None:
    a, b = operands(np.random.default_rng(seed), m, n, k, layout, of_codes)
    with pytest.MonkeyPatch.context() as patch:
        results = on_every_isa(patch, lambda: multiply(a, b, layout))
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    x, y = x.T if layout[0] else x, y if layout[1] else y.T
    bound = (k + 1) * EPS * (np.abs(x) @ np.abs(y))
    assert (np.abs(results[0] - x @ y) <= bound).all()
    assert (np.abs(multiply(a, b, layout, "reference") - x @ y) <= bound).all()


@needs_library
@pytest.mark.parametrize(("m", "n", "k"), [(2100, 33, 300), (35, 2100, 300), (40, 40, 70_000)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_element_does_not_depend_on_other_rows_columns_or_threads(
    m: int, n: int, k: int, layout: tuple[bool, bool]
) -> None:
    a, b = operands(np.random.default_rng(0), m, n, k, layout, False)
    whole = multiply(a, b, layout)
    rows = a[:, m - 3 :] if layout[0] else a[m - 3 :]
    columns = b[:, n - 5 :] if layout[1] else b[n - 5 :]
    np.testing.assert_array_equal(multiply(rows, columns, layout), whole[m - 3 :, n - 5 :])
    try:
        cpu.set_thread_count(1)
        np.testing.assert_array_equal(multiply(a, b, layout), whole)
    finally:
        cpu.set_thread_count(threads())


@needs_library
def test_special_values_reach_their_row_and_column_only() -> None:
    a, b = operands(np.random.default_rng(0), 20, 30, 40, (False, False), False)
    expected = multiply(a, b, (False, False))
    got = multiply(a.at[3, 5].set(jnp.nan), b.at[7, 2].set(jnp.inf), (False, False))
    assert np.isnan(got[3]).all()
    assert np.isinf(np.delete(got[:, 7], 3)).all()
    np.testing.assert_array_equal(
        np.delete(np.delete(got, 3, 0), 7, 1), np.delete(np.delete(expected, 3, 0), 7, 1)
    )


def test_under_jit_and_vmap() -> None:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((3, *shape)), jnp.float32) for shape in ((4, 6), (5, 6)))
    x, w = (jnp.asarray(rng.integers(-1, 2, (3, *shape)), jnp.int8) for shape in ((4, 6), (5, 6)))
    np.testing.assert_allclose(
        jax.jit(jax.vmap(float_matmul))(a, b), jnp.einsum("bmk,bnk->bmn", a, b), atol=1e-5
    )
    sums = jax.jit(jax.vmap(lambda x, w: code_matmul(x, w, "ternary2")))(x, w)
    np.testing.assert_array_equal(sums, jnp.einsum("bmk,bnk->bmn", x.astype(jnp.int32), w.astype(jnp.int32)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: code_matmul(jnp.ones((2, 3)), jnp.ones((2, 3)), "int8"), "expected int8 codes"),
        (lambda: code_matmul(*[jnp.ones((2, 3), jnp.int8)] * 2, "int3"), "format='int3' is unknown"),
        (
            lambda: code_matmul(jnp.ones((2, 3), jnp.int8), jnp.ones((2, 4), jnp.int8), "int8"),
            "got x.2, 3., w.2, 4.",
        ),
        (lambda: code_matmul(*[jnp.ones((1, 2**17), jnp.int8)] * 2, "int8"), "expected at most 65536"),
        (lambda: code_matmul(*[jnp.ones((1, 2), jnp.int8)] * 2, "int8", dtype="int4"), "dtype='int4'"),
        (lambda: float_matmul(jnp.ones((2, 3)), jnp.ones((3, 2))), "same number of inputs"),
        (lambda: float_matmul(jnp.ones((2, 3), jnp.int8), jnp.ones((2, 3))), "expected float32"),
        (lambda: float_matmul(*[jnp.ones((2, 3))] * 2, implementation="gpu"), "implementation='gpu'"),
    ],
)
def test_invalid_operands_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
