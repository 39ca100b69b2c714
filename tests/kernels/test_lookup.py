"""Row look-up in a bfloat16 table: values, out-of-range indices, and no copy of the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import cpu
from bitnet_kernels.lookup import bfloat16_rows

TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(50, 7)), jnp.bfloat16)


@pytest.mark.parametrize("indices", [[[0, 49], [3, 3]], [5], []])
def test_rows_equal_those_of_the_table(indices: list) -> None:
    indices = jnp.asarray(indices, jnp.int32)
    expected = np.asarray(TABLE, np.float32)[np.asarray(indices)]
    for lookup in (bfloat16_rows, jax.jit(bfloat16_rows)):
        rows = lookup(TABLE, indices)
        assert rows.dtype == jnp.float32
        np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(jax.vmap(bfloat16_rows, (None, 0))(TABLE, indices), expected)


def test_an_out_of_range_index_gives_nan() -> None:
    rows = np.asarray(bfloat16_rows(TABLE, jnp.array([50, -1, 1])))
    assert np.isnan(rows[:2]).all()
    assert np.isfinite(rows[2]).all()


def test_a_float32_table_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"table is float32\[2, 3\]; expected bfloat16"):
        bfloat16_rows(jnp.ones((2, 3)), jnp.zeros(1, jnp.int32))


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
def test_the_table_is_not_copied() -> None:
    table = jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16)
    compiled = jax.jit(bfloat16_rows).lower(table, jax.ShapeDtypeStruct((2,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096  # the table is half a megabyte
