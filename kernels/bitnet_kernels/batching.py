"""How a product of packed matrices behaves under vmap, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_batches(call: Callable[..., Any], rows_axis: int) -> Callable[..., Any]:
    """call(x [m, k], *matrices) under vmap: more rows where only x is batched, else one call after the other.

    rows_axis: the axis of every result that holds the rows of x.
    """
    batched_call = jax.custom_batching.custom_vmap(call)

    @batched_call.def_vmap
    def rule(axis_size: int, batched: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        if any(batched[1:]):
            several = [array for array, is_batched in zip(arrays, batched, strict=True) if is_batched]

            def one(slices: list[jax.Array]) -> Any:
                taken = iter(slices)
                return batched_call(*(next(taken) if b else a for a, b in zip(arrays, batched, strict=True)))

            results = jax.lax.map(one, several)
        else:
            x, *matrices = arrays
            results = batched_call(x.reshape(axis_size * x.shape[1], x.shape[2]), *matrices)

            def unfold(y: jax.Array) -> jax.Array:
                shape = (*y.shape[:rows_axis], axis_size, x.shape[1], *y.shape[rows_axis + 1 :])
                return jnp.moveaxis(y.reshape(shape), rows_axis, 0)

            results = jax.tree.map(unfold, results)
        return results, jax.tree.map(lambda _: True, results)

    return batched_call
