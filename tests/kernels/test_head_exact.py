"""The exact head: its largest logits equal those of the bfloat16 head for any values."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_kernels import PackedArray, bfloat16_logits, cpu, exact_top_logits, head_bounds, pack, unpack

pytestmark = pytest.mark.optimized

built = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
ISAS = cpu.available_isas()


def int8_copy(table: np.ndarray) -> PackedArray:
    wide = table.astype(np.float32)
    scale = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(1e-5)) / np.float32(127)
    return pack(np.clip(np.round(wide / scale), -127, 127).astype(np.int8), scale, "int8")


def check(x: np.ndarray, table: np.ndarray, k: int, w: PackedArray | None = None) -> np.ndarray:
    """Compares with the full head; returns the number of candidates of each row of x."""
    w = int8_copy(table) if w is None else w
    got, candidates = exact_top_logits(x, table, w, head_bounds(table, w), k)
    got, whole = np.asarray(got), np.asarray(bfloat16_logits(x, table))
    known = ~np.isneginf(got)
    np.testing.assert_array_equal(got[known], whole[known])
    for row, (logits, kept) in enumerate(zip(whole, known, strict=True)):
        kth = np.sort(logits)[-min(k, len(logits))]
        missing = (logits >= kth) & ~kept & ~np.isneginf(logits)
        assert not missing.any(), f"row {row}: {missing.sum()} of the {k} largest are missing"
        assert kept.sum() <= candidates[row] <= len(logits)
    # The values that sampling uses.
    np.testing.assert_array_equal(jax.lax.top_k(got, k)[1], jax.lax.top_k(whole, k)[1])
    return np.asarray(candidates)


def normal(m: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    table = random.normal(size=(n, k)).astype(ml_dtypes.bfloat16)
    return random.normal(size=(m, k)).astype(np.float32), table


@pytest.mark.slow
def test_random_heads_need_few_candidates() -> None:
    x, table = normal(3, 20000, 256)
    greedy, forty = check(x, table, 1), check(x, table, 40)
    if cpu.unavailable() is None:
        # Bounds exceed logits by half a standard deviation: some of the largest become candidates, not most.
        assert greedy.max() < 400
        assert forty.max() < 2000
        assert (greedy <= forty).all()


def ties(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table[5::7] = table[3]
    return x, table


def near_ties(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that differ from the best one only in the last bit of one weight."""
    best = int(np.argmax(np.asarray(bfloat16_logits(x[:1], table))))
    for row in range(0, len(table), 3):
        table[row] = table[best]
        table.view(np.uint16)[row, row % table.shape[1]] ^= 1
    return x, table


def outliers(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with one huge weight, which leaves no codes for the others; one of them is multiplied by a zero of x."""
    table[::5, 3] = 1e4
    table[1::5, 4] = -3e4
    x[0, 3] = 0
    return x, table


def huge(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table[::4] = (table[::4].astype(np.float32) * 2.0**120).astype(ml_dtypes.bfloat16)
    return x * np.float32(64), table


def tiny(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x * np.float32(1e-38), (table.astype(np.float32) * 1e-3).astype(ml_dtypes.bfloat16)


def zero_x(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros_like(x), table


def constant_rows(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ones_like(x), np.full_like(table, 0.5)


def zero_rows(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table[::2] = 0
    return x, table


def not_numbers(x: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x[0, 1], x[1, 2] = np.inf, np.nan
    return x, table


ADVERSARIES = (ties, near_ties, outliers, huge, tiny, zero_x, constant_rows, zero_rows)


@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversarial_heads(adversary: Callable[..., tuple[np.ndarray, np.ndarray]], k: int) -> None:
    with np.errstate(over="ignore"):
        check(*adversary(*normal(3, 300, 70)), k)


def test_with_nan_bounds_every_row_is_a_candidate() -> None:
    x, table = not_numbers(*normal(3, 300, 70))
    w = int8_copy(table)
    got, candidates = exact_top_logits(x, table, w, head_bounds(table, w), 2)
    np.testing.assert_array_equal(got[:2], bfloat16_logits(x[:2], table))
    np.testing.assert_array_equal(candidates[:2], [300, 300])


def parallel_errors() -> tuple[np.ndarray, np.ndarray, PackedArray, int]:
    """The worst case of the Cauchy-Schwarz inequality, with a row that must not be missed.

    All rows have equal codes except one, the only one whose int8 product is larger. The error of that row points
    against x and that of another row, `winner`, along x: it has the largest logit, although its int8 product is smaller
    by nearly as much as the bound allows.
    """
    n, k, winner = 40, 128, 17
    random = np.random.default_rng(3)
    x = random.choice(np.array([-1, 1], np.float32), (1, k))
    codes = np.tile(random.integers(-100, 101, (1, k)), (n, 1)).astype(np.int8)
    sign = np.zeros(n, np.float32)
    sign[winner], sign[5] = 1, -1
    ahead = np.flatnonzero(x[0] > 0)[:20]
    codes[5, ahead] += 1
    table = (codes.astype(np.float32) + 0.25 * sign[:, None] * x).astype(ml_dtypes.bfloat16)
    return x, table, pack(codes, np.ones((n, 1), np.float32), "int8"), winner


@built
def test_the_bound_is_necessary_and_sufficient() -> None:
    x, table, w, winner = parallel_errors()
    assert int(np.argmax(bfloat16_logits(x, table))) == winner
    check(x, table, 1, w)
    # A third of the bound is not sufficient: this test can fail.
    less = exact_top_logits(x, table, w, head_bounds(table, w) * jnp.asarray([[0.3], [1]]), 1)
    assert np.isneginf(less.logits[0, winner])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 12),
    spread=st.sampled_from([0, 1, 4, 20, 60]),
    coarse=st.integers(1, 127),
)
def test_the_bound_holds(seed: int, k: int, spread: int, coarse: int) -> None:
    """Weights over many magnitudes, and copies as coarse as one bit: fewer codes only add candidates."""
    random = np.random.default_rng(seed)
    x = (random.normal(size=(2, 48)) * 2.0 ** random.integers(-spread, spread + 1, (2, 48))).astype(
        np.float32
    )
    table = random.normal(size=(60, 48)) * 2.0 ** random.integers(-spread, spread + 1, (60, 48))
    table = table.astype(ml_dtypes.bfloat16)
    scale = np.abs(table.astype(np.float32)).max(axis=1, keepdims=True) / np.float32(coarse)
    codes = np.clip(np.round(table.astype(np.float32) / scale), -127, 127).astype(np.int8)
    check(x, table, k, pack(codes, scale, "int8"))


def test_bounds_are_the_norms_rounded_up() -> None:
    _, table = outliers(*normal(2, 100, 300))
    table[7] = 0
    table[8] = (table[8].astype(np.float32) * 1e-25).astype(ml_dtypes.bfloat16)  # whose squares underflow
    w = int8_copy(table)
    weight = np.asarray(unpack(w), np.float64) * np.asarray(w.scale, np.float64)
    error = table.astype(np.float64) - weight
    for bound, exact in zip(np.asarray(head_bounds(table, w), np.float64), (error, weight), strict=True):
        norms = np.linalg.norm(exact, axis=1)
        assert (bound >= norms).all()
        # 316 roundings of 2^-23, plus 2^-22 of |w| for the error.
        slack = 1e-4 * norms + 1e-6 * np.linalg.norm(weight, axis=1) + 1e-29
        assert (bound <= norms + slack).all()


@pytest.mark.extended(after=3)
@built
@pytest.mark.parametrize("isa", ISAS)
def test_results_are_equal_for_every_instruction_set_and_number_of_threads(isa: str, monkeypatch) -> None:
    x, table = normal(2, 9000, 100)
    w = int8_copy(table)
    bounds = head_bounds(table, w)
    expected = exact_top_logits(x, table, w, bounds, 3)
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    got = exact_top_logits(x, table, w, bounds, 3)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_shapes_jit_and_the_reference() -> None:
    x, table = normal(6, 50, 64)
    w = int8_copy(table)
    bounds = head_bounds(table, w)
    batched = x.reshape(2, 3, 64)
    got = jax.jit(exact_top_logits, static_argnums=4)(batched, table, w, bounds, 2)
    assert got.logits.shape == (2, 3, 50)
    assert got.candidates.shape == (2, 3)
    every = exact_top_logits(x, table, w, bounds, 2, implementation="reference")
    np.testing.assert_array_equal(every.candidates, [50] * 6)
    assert not np.isneginf(every.logits).any()
    np.testing.assert_array_equal(exact_top_logits(x, table, w, bounds, 50).candidates, [50] * 6)


def test_invalid_operands_are_rejected() -> None:
    x, table = normal(2, 20, 64)
    w = int8_copy(table)
    bounds = head_bounds(table, w)
    grouped = pack(np.zeros((20, 64), np.int8), np.ones((20, 2), np.float32), "int8")
    other = pack(np.zeros((20, 64), np.int8), np.ones((20, 1), np.float32), "int4")
    for arguments, message in (
        ((x, table, grouped, bounds, 1), r"scales \[20, 2\]; expected int8\[20, 64\] with scales \[20, 1\]"),
        ((x, table, other, bounds, 1), r"w is int4"),
        ((x, table, int8_copy(table[:16]), bounds, 1), r"w is int8\[16, 64\]"),
        ((x, table, w, bounds[:, :3], 1), r"bounds are float32\[2, 3\]"),
        ((x, table, w, bounds, 0), "got k=0, 64 inputs; expected k >= 1"),
        ((x, table.astype(np.float32), w, bounds, 1), "table is float32"),
    ):
        with pytest.raises(ValueError, match=message):
            exact_top_logits(*arguments)
