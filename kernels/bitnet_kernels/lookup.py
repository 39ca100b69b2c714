"""Row lookup in a bfloat16 table without converting all of it to float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bitnet_kernels import cpu
from bitnet_kernels.dtypes import integers


def bfloat16_rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of a table bfloat16 [n, k] at integer indices [...] -> float32 [..., k]; NaN for out-of-range indices.

    XLA's CPU backend has no bfloat16 gather: it converts the whole table to float32 in every decode step. On CPU a
    C++ loop is used instead if the library was built; values are identical.

    Raises:
      ValueError: the table is not bfloat16[n, k], or the indices are not integers.
    """
    indices = integers("indices", indices)
    if table.dtype != jnp.bfloat16 or table.ndim != 2:
        raise ValueError(f"table is {table.dtype}{list(table.shape)}; expected bfloat16[n, k]")
    flat = indices.reshape(-1)
    if flat.dtype.itemsize > 4:  # out-of-range indices must stay so in int32
        flat = jnp.clip(flat, -1, table.shape[0])
    flat = flat.astype(jnp.int32)
    branches = {} if cpu.unavailable() else {"cpu": cpu.lookup}
    rows = jax.lax.platform_dependent(table, flat, **branches, default=_take)
    return rows.reshape(*indices.shape, table.shape[1])


def _take(table: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take(table, jnp.where(indices < 0, table.shape[0], indices), axis=0).astype(jnp.float32)
