"""The output head: the same order of operations on every instruction set."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bitnet_kernels import bfloat16_logits, cpu, exact_top_logits, head_bounds, pack

pytestmark = pytest.mark.optimized

built = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
ISAS = cpu.available_isas()
# Less than a vector, vector tails, fewer rows than streams, more rows of x than a tile and a block.
SHAPES = ((1, 1, 1), (2, 3, 15), (1, 37, 16), (7, 70, 33), (5, 9, 100), (61, 50, 160), (1, 1000, 640))


def operands(m: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x [m, k] and table [n, k] over many orders of magnitude, so that summation order affects the bits."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(m, k)) * 2.0 ** random.integers(-8, 9, (m, k))
    table = random.normal(size=(n, k)) * 2.0 ** random.integers(-8, 9, (n, k))
    return x.astype(np.float32), table.astype(ml_dtypes.bfloat16)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c with one rounding to float32, for bfloat16 values b.

    The product, of 24 and 8 significant bits, is exact in float64. The sum is rounded twice, to float64 and to
    float32; rounding the first time to odd keeps the second one right (Boldo and Melquiond 2008).
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)  # two-sum: the exact rounding error of the addition
    even = (total.view(np.int64) & 1) == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    odd = np.where((lost != 0) & even, np.nextafter(total, towards), total)
    return odd.astype(np.float32)


def definition(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The order of operations specified in kernels/csrc/head.h."""
    (m, k), n = x.shape, len(table)
    pad = -k % 16
    x = np.pad(x, ((0, 0), (0, pad))).reshape(m, 1, -1, 16)
    table = np.pad(table, ((0, 0), (0, pad))).reshape(1, n, -1, 16)
    lanes = np.zeros((m, n, 16), np.float32)
    for step in range(x.shape[2]):
        lanes = fused(x[:, :, step], table[:, :, step], lanes)
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


@built
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_every_instruction_set_follows_the_order_bit_for_bit(isa: str, m: int, n: int, k: int) -> None:
    x, table = operands(m, n, k)
    np.testing.assert_array_equal(cpu.bfloat16_logits(x, table, isa_name=isa), definition(x, table))


@built
def test_a_logit_does_not_depend_on_the_other_rows() -> None:
    x, table = operands(61, 333, 200)
    whole = np.asarray(bfloat16_logits(x, table))
    for rows in (slice(0, 1), slice(3, 8), slice(20, 61)):
        np.testing.assert_array_equal(bfloat16_logits(x[rows], table), whole[rows])
        np.testing.assert_array_equal(bfloat16_logits(x, table[rows]), whole[:, rows])


@built
@pytest.mark.parametrize("isa", ISAS)
def test_special_values(isa: str) -> None:
    x = np.array([[0, 0], [1, 0], [-0.0, 0], [np.inf, 1], [np.nan, 1], [3e38, 3e38], [1e-40, 0]], np.float32)
    table = np.array([[1, 1], [0, 0], [-2, 2], [4e-39, 1]], ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore", over="ignore"):
        wide = table.astype(np.float32)
        expected = x[:, :1] * wide[:, 0] + x[:, 1:] * wide[:, 1]
    got = np.asarray(cpu.bfloat16_logits(x, table, isa_name=isa))
    # With two inputs each product has a single rounding; subnormals are kept, overflow gives infinity.
    np.testing.assert_array_equal(got, expected)
    assert got[6, 0] == np.float32(1e-40) != 0


def test_kernel_and_reference_are_within_the_bound_of_the_exact_sum() -> None:
    m, n, k = 9, 50, 2560
    x, table = operands(m, n, k)
    wide = table.astype(np.float64)
    exact, size = x.astype(np.float64) @ wide.T, np.abs(x.astype(np.float64)) @ np.abs(wide).T
    for implementation, additions in ((None, k / 16 + 4), ("reference", k)):
        y = np.asarray(bfloat16_logits(x, table, implementation=implementation), np.float64)
        if implementation is None and cpu.unavailable():
            additions = k
        assert (np.abs(y - exact) <= additions * 2.0**-24 * size).all()


def test_leading_axes_vmap_jit_and_gradients() -> None:
    x, table = operands(12, 20, 48)
    flat = np.asarray(bfloat16_logits(x, table))
    batched = jnp.asarray(x).reshape(3, 4, 48)
    np.testing.assert_array_equal(bfloat16_logits(batched, table), flat.reshape(3, 4, 20))
    np.testing.assert_array_equal(jax.jit(bfloat16_logits)(x, table), flat)
    by_vmap = jax.vmap(bfloat16_logits, (0, None))(batched, table)
    np.testing.assert_allclose(
        by_vmap, flat.reshape(3, 4, 20), rtol=1e-5
    )  # where XLA multiplies, in any order
    tables = jnp.stack([jnp.asarray(table), jnp.asarray(-table)])
    np.testing.assert_allclose(
        jax.vmap(bfloat16_logits, (None, 0))(x, tables), np.stack([flat, -flat]), rtol=1e-5
    )
    dy = np.random.default_rng(1).normal(size=flat.shape).astype(np.float32)
    (dx,) = jax.vjp(lambda x: bfloat16_logits(x, table), jnp.asarray(x))[1](jnp.asarray(dy))
    # Sums of 20 products in an order chosen by XLA.
    np.testing.assert_allclose(dx, dy @ table.astype(np.float32), rtol=1e-4, atol=1e-3)


@built
def test_no_rows_of_x_give_no_rows() -> None:
    _, table = operands(1, 20, 48)
    assert bfloat16_logits(jnp.zeros((0, 48)), table).shape == (0, 20)


@pytest.mark.parametrize(
    ("x", "table", "options", "message"),
    [
        (jnp.zeros((2, 4)), jnp.zeros((3, 4)), {}, r"table is float32\[3, 4\]; expected bfloat16"),
        (jnp.zeros((2, 5)), jnp.zeros((3, 4), jnp.bfloat16), {}, r"x is float32\[2, 5\]; expected .* 4\]"),
        (jnp.zeros((2, 4), jnp.int8), jnp.zeros((3, 4), jnp.bfloat16), {}, "x is int8"),
        (jnp.zeros((2, 4)), jnp.zeros((3, 4), jnp.bfloat16), {"implementation": "gpu"}, "expected None or"),
    ],
)
def test_invalid_operands_are_rejected(x, table, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bfloat16_logits(x, table, **options)


@built
@pytest.mark.parametrize(
    ("table", "y", "isa", "message"),
    [
        ((3, 5), (2, 3), "scalar", r"got x\[2, 4\], table\[3, 5\], y\[2, 3\]"),
        ((3, 4), (2, 4), "scalar", r"expected x\[m, k\], table\[n, k\] and y\[m, n\]"),
        ((3, 4), (2, 3), "mmx", "isa=mmx is not available; expected one of scalar"),
    ],
)
def test_the_custom_call_rejects_invalid_operands(table, y, isa: str, message: str) -> None:
    call = jax.ffi.ffi_call("bitnet_kernels_bfloat16_logits", jax.ShapeDtypeStruct(y, jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(jnp.zeros((2, 4)), jnp.zeros(table, jnp.bfloat16), isa=isa)


def test_without_the_library_xla_is_used_after_a_warning(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    cpu.warn_once.cache_clear()
    x, table = operands(2, 20, 48)
    w = pack(np.zeros((20, 48), np.int8), np.ones((20, 1), np.float32), "int8")
    with pytest.warns(RuntimeWarning, match="the output head runs on XLA.*was not built"):
        y = bfloat16_logits(x, table)
    np.testing.assert_array_equal(
        y, bfloat16_logits(x, table, implementation="reference")
    )  # no second warning
    got = exact_top_logits(x, table, w, head_bounds(table, w), 1)
    np.testing.assert_array_equal(got.logits, y)
    for function in (bfloat16_logits, lambda *a, **o: exact_top_logits(*a, w, head_bounds(table, w), 1, **o)):
        with pytest.raises(NotImplementedError, match="implementation='cpu' cannot be used: none.so"):
            function(x, table, implementation="cpu")
    cpu.warn_once.cache_clear()
