"""Rows of a bfloat16 table, without a float32 copy of all of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bitnet_kernels import cpu


def bfloat16_rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """The rows of a table bfloat16 [n, k] at integer indices [...] -> float32 [..., k]; NaN for one outside.

    XLA's CPU has no bfloat16 gather: it converts the whole table to float32 to take a few rows, on every step of
    a generation. There a C++ loop takes them, where the library was built; the values are the same.
    """
    if table.dtype != jnp.bfloat16 or table.ndim != 2:
        raise ValueError(f"table is {table.dtype}{list(table.shape)}; expected bfloat16[n, k]")
    flat = indices.reshape(-1).astype(jnp.int32)
    branches = {} if cpu.unavailable() else {"cpu": cpu.lookup}
    rows = jax.lax.platform_dependent(table, flat, **branches, default=_take)
    return rows.reshape(*indices.shape, table.shape[1])


def _take(table: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take(table, jnp.where(indices < 0, table.shape[0], indices), axis=0).astype(jnp.float32)
