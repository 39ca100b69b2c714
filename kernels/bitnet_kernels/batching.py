"""vmap rule for products of packed matrices, common to all backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_batches(call: Callable[..., Any], rows_axis: int) -> Callable[..., Any]:
    """Gives call(x [m, k], *matrices) a vmap rule: fold the batch into rows if only x is batched, else loop.

    rows_axis: the axis of each result that corresponds to the rows of x.
    """
    batched_call = jax.custom_batching.custom_vmap(call)

    @batched_call.def_vmap
    def rule(axis_size: int, batched: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        if any(batched[1:]):
            sliced = [array for array, is_batched in zip(arrays, batched, strict=True) if is_batched]

            def one(slices: list[jax.Array]) -> Any:
                remaining = iter(slices)
                return batched_call(
                    *(next(remaining) if b else a for a, b in zip(arrays, batched, strict=True))
                )

            results = jax.lax.map(one, sliced)
        else:
            x, *matrices = arrays
            results = batched_call(x.reshape(axis_size * x.shape[1], x.shape[2]), *matrices)

            def unfold(y: jax.Array) -> jax.Array:
                shape = (*y.shape[:rows_axis], axis_size, x.shape[1], *y.shape[rows_axis + 1 :])
                return jnp.moveaxis(y.reshape(shape), rows_axis, 0)

            results = jax.tree.map(unfold, results)
        return results, jax.tree.map(lambda _: True, results)

    return batched_call
