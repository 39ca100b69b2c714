"""Sequences whose tokens are split over the mesh axis context.

Linear layers, norms and the loss work token by token, so each device handles its own T / n tokens. Attention
needs the keys and values of all of them (`whole_sequence`): 2 K h numbers a token, few with grouped queries. Queries
and scores stay split. What flattens or cuts the axis T does so within the tokens of a device (`to_rows`, `cut`): in the
order of the sequence devices would need tokens of each other.

Without that axis, or where it does not divide the tokens, these functions are what they are on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from bitnet_jax.nn.placement import BATCH_AXES, CONTEXT, automatic_axes, split_over_tokens


def context_parts(length: int) -> int:
    """Parts into which a sequence of `length` tokens is split."""
    parts = automatic_axes().get(CONTEXT, 1)
    return parts if length % parts == 0 else 1


def split_sequence(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Constrains x to be split like activations if sequences are split."""
    return x if context_parts(x.shape[1]) == 1 else split_over_tokens(x)


def whole_sequence(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Constrains x to hold all tokens of a sequence on every device of context: an all-gather.

    Its gradient is summed over these devices; each keeps the part for its own tokens.
    """
    return x if context_parts(x.shape[1]) == 1 else _whole(x)


@jax.custom_vjp
def _whole(x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, _second_axis_over(None, x.ndim))


def _whole_backward(_: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, _second_axis_over(CONTEXT, gradient.ndim)),)


_whole.defvjp(lambda x: (_whole(x), None), _whole_backward)


def _second_axis_over(axis: str | None, ndim: int) -> PartitionSpec:
    free = PartitionSpec.UNCONSTRAINED
    return PartitionSpec(free, axis, *(free,) * (ndim - 2))


def to_rows(x: Shaped[Array, "*rows k"]) -> Shaped[Array, "m k"]:
    """`x.reshape(-1, k)`, for tokens [B, T] with those of a device side by side."""

    def rows(x: Array) -> Array:
        return x.reshape(-1, x.shape[-1])

    if x.ndim != 3 or context_parts(x.shape[1]) == 1:
        return rows(x)
    batch = _batch_axes(x.shape[0])
    return _on_each_device(rows, x, PartitionSpec(batch, CONTEXT), PartitionSpec((*batch, CONTEXT)))


def from_rows(rows: Shaped[Array, "m n"], shape: tuple[int, ...]) -> Shaped[Array, "*rows n"]:
    """The inverse of `to_rows` for an x of shape [*shape, k]."""
    if len(shape) != 2 or (parts := context_parts(shape[1])) == 1:
        return rows.reshape(*shape, rows.shape[-1])
    batch = _batch_axes(shape[0])

    def tokens(rows: Array) -> Array:
        return rows.reshape(-1, shape[1] // parts, rows.shape[-1])

    return _on_each_device(tokens, rows, PartitionSpec((*batch, CONTEXT)), PartitionSpec(batch, CONTEXT))


def cut(x: Shaped[Array, "B T ..."], pieces: int) -> Shaped[Array, "pieces B t ..."]:
    """The tokens in pieces for a loop; of each device T / n / pieces consecutive ones in a piece."""

    def own(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, -1, *x.shape[2:]), 1, 0)

    if context_parts(x.shape[1]) == 1:
        return own(x)
    batch = _batch_axes(x.shape[0])
    return _on_each_device(own, x, PartitionSpec(batch, CONTEXT), PartitionSpec(None, batch, CONTEXT))


def join(x: Shaped[Array, "pieces B t ..."]) -> Shaped[Array, "B T ..."]:
    """The inverse of `cut`."""

    def own(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    if context_parts(x.shape[0] * x.shape[2]) == 1:
        return own(x)
    batch = _batch_axes(x.shape[1])
    return _on_each_device(own, x, PartitionSpec(None, batch, CONTEXT), PartitionSpec(batch, CONTEXT))


def _on_each_device(
    function: Callable[[Array], Array], x: Array, before: PartitionSpec, after: PartitionSpec
) -> Array:
    axes = {axis for axis in (*BATCH_AXES, CONTEXT) if axis in automatic_axes()}
    return jax.shard_map(function, in_specs=before, out_specs=after, axis_names=axes)(x)


def _batch_axes(size: int) -> tuple[str, ...]:
    """The axes over which `size` sequences are split."""
    sizes = automatic_axes()
    axes = tuple(axis for axis in BATCH_AXES if axis in sizes)
    return axes if size % math.prod(sizes[axis] for axis in axes) == 0 else ()
