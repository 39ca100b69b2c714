"""Products over several devices, each of which holds only its part of the packed matrix."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from bitnet_kernels import reference
from bitnet_kernels.matmul import CODES, packed_matmul
from bitnet_kernels.packed import COLUMN_K, FORMATS, PANEL_ROWS, PLANE_K, PLANE_ROWS, PackedArray

SPLITS = ("outputs", "inputs")


def sharded_matmul(
    x: jax.Array, w: PackedArray, mesh: Mesh, axis: str, split: str, **options: Any
) -> jax.Array:
    """packed_matmul(x, w, **options) on the devices along a mesh axis; x float or int8 [m, k].

    split="outputs": each device has a part of the outputs and all of x; the result [m, n] is split along n.
    split="inputs": each device has a part of the inputs of w and x; the result is summed and replicated.
    w is resharded to `specs` if necessary. Results are bit-identical to packed_matmul while integer sums stay below
    2^24, except for scale groups split along the inputs, where float sums are rounded in another order.

    Raises:
      ValueError: the parts would not be whole blocks of the layout.
    """
    devices = mesh.shape[axis]
    _check(w, devices, split)
    spec = specs(w, axis, split)
    if split == "outputs":
        shape = (w.shape[0] // devices, w.shape[1])

        def part(x: jax.Array, w: PackedArray) -> jax.Array:
            return packed_matmul(x, dataclasses.replace(w, shape=shape), **options)

        return _on_devices(part, mesh, (PartitionSpec(), spec), PartitionSpec(None, axis))(x, w)

    bits = options.get("activation_bits", 8)
    quantizes = x.dtype not in CODES and bits in (8, 16)  # else packed_matmul takes x as it is, or refuses it
    codes, x_scale = reference.quantize_activations(x, bits) if quantizes else (x, None)
    one_scale = w.groups == 1

    def partial_sum(x: jax.Array, w: PackedArray) -> jax.Array:
        local = dataclasses.replace(w, shape=(w.shape[0], w.shape[1] // devices))
        if one_scale:
            zero = None if w.minimum is None else jnp.zeros((1, 1), jnp.float32)
            local = dataclasses.replace(local, scale=jnp.ones((1, 1), jnp.float32), minimum=zero)
        return jax.lax.psum(packed_matmul(x, local, **options), axis)

    y = _on_devices(partial_sum, mesh, (PartitionSpec(None, axis), spec), PartitionSpec())(codes, w)
    if one_scale:
        x_sums = reference.group_sums(codes, w, jnp.int32 if codes.dtype in CODES else jnp.float32)
        y = reference.rescale(y[None], w.scale, w.minimum, x_sums)
    return y if x_scale is None else reference.rounded_product(y, x_scale)


def specs(w: PackedArray, axis: str, split: str) -> PackedArray:
    """w with its leaves replaced by PartitionSpecs, for a split along its outputs or inputs."""
    n_axis = 1 if w.layout == "column" else 0
    codes: list[str | None] = [None] * w.codes.ndim
    codes[n_axis if split == "outputs" else 1 - n_axis] = axis
    per_output = split == "outputs" and w.scale.shape[0] > 1
    per_group = split == "inputs" and w.groups > 1
    scale = PartitionSpec(axis if per_output else None, axis if per_group else None)
    leaves: Any = PartitionSpec(*codes), scale, None if w.minimum is None else scale
    return dataclasses.replace(w, codes=leaves[0], scale=leaves[1], minimum=leaves[2])


def _on_devices(part: Any, mesh: Mesh, in_specs: Any, out_specs: PartitionSpec) -> Any:
    # check_vma=False: Pallas calls do not declare the mesh axes along which their results vary.
    return jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _check(w: PackedArray, devices: int, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; expected one of {SPLITS}")
    block_k = {"panel16": FORMATS[w.format].block_k, "column": COLUMN_K, "plane": PLANE_K}[w.layout]
    block_n = {"panel16": PANEL_ROWS, "column": 1, "plane": PLANE_ROWS}[w.layout]
    size, block = (w.shape[0], block_n) if split == "outputs" else (w.shape[1], block_k)
    if size % (devices * block):
        raise ValueError(
            f"{size} {split} of a {w.format} matrix in layout {w.layout} on {devices} devices; "
            f"expected a multiple of {devices} x {block}"
        )
    if split == "inputs" and w.groups > 1 and w.groups % devices:
        raise ValueError(
            f"{w.groups} groups of inputs on {devices} devices; expected a multiple of {devices}"
        )
