"""The axes of a device mesh, and where arrays of a forward pass lie on it where the compiler must be told.

Nothing here acts without a mesh in context (`jax.set_mesh`). Axes that do not divide an array leave it whole.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (
    DATA,
    FSDP,
)  # a batch is split over both: fsdp also splits parameters, which are gathered to be used


def split_over_batch(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """The same x, its first axis split over data and fsdp.

    Else the compiler may split x along the axis that a parameter is split by, and then sums activations over
    devices where it should gather the smaller parameter.
    """
    return _first_axis_split(x, BATCH_AXES)


def whole_rows(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """The same table with its rows split over tensor and each row whole.

    For look-ups: rows in parts would become activations in parts, which no batch is split by.
    """
    return _first_axis_split(table, (TENSOR,))


def _first_axis_split(x: Array, axes: tuple[str, ...]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(axis for axis in axes if kinds.get(axis) == AxisType.Auto)  # not those of a shard_map around
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
