"""The axes of a device mesh, and sharding constraints on arrays of the forward pass.

All are no-ops without a mesh in context (`jax.set_mesh`). An array that the mesh axes do not divide is not split.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Shaped

DATA, FSDP, CONTEXT, TENSOR = AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = (
    DATA,
    FSDP,
)  # a batch is split over both; fsdp also splits parameters, which are gathered for use


# Their inputs are outputs of layers split by outputs, so only their partial sums cross devices (1909.08053).
SPLIT_BY_INPUTS = ("o_proj", "down_proj")


def matrix_axes(layer: str) -> tuple[str, str]:
    """The mesh axes along which the rows and the columns of a linear layer's weight (or of a table) are split."""
    return (FSDP, TENSOR) if layer in SPLIT_BY_INPUTS else (TENSOR, FSDP)


def on_one_device() -> bool:
    """Whether no mesh in context has several devices, on which XLA would gather the operands of a custom call."""
    return jax.sharding.get_abstract_mesh().size <= 1


def split_over_tokens(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Constrains the first axis of x to be split over data and fsdp, and the second over context.

    Otherwise the compiler may split x along the axis of a split parameter, and then all-reduces activations where it
    should gather the smaller parameter.
    """
    return _split(x, BATCH_AXES, (CONTEXT,))


def split_by_rows(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Constrains a table to be split by rows over tensor, with each row whole.

    For lookups: split rows would give activations split along features instead of along the batch.
    """
    return _split(table, (TENSOR,))


def whole(x: Array) -> Array:
    """Constrains x to be whole on every device, so that every process of a run can read it."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if automatic_axes() else x


def automatic_axes() -> dict[str, int]:
    """The axes of the mesh in context along which XLA places arrays (not in a shard_map), and their devices."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis: mesh.shape[axis] for axis, kind in kinds.items() if kind == AxisType.Auto}


def _split(x: Array, *axes: tuple[str, ...]) -> Array:
    """The leading axes of x split, each over those of the mesh axes named for it that the mesh has."""
    sizes = automatic_axes()
    spec: list[tuple[str, ...] | None] = []
    for size, names in zip(x.shape, axes, strict=False):
        present = tuple(name for name in names if name in sizes)
        divides = present and size % math.prod(sizes[name] for name in present) == 0
        spec.append(present if divides else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x
