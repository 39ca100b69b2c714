"""Weights that are sharded over devices are gathered as packed codes: 1, 2 or 4 bits a weight instead of 32.

Under fully sharded data parallelism (mesh axis fsdp) every device holds a part of each matrix and needs all of it for
the product. Quantizing commutes with gathering once the scale is known, so a device quantizes its part, packs the
codes, and only bytes travel; the result has the same bits. The gradient of the codes is summed and sharded as before.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt8

from bitnet_jax.nn.placement import FSDP, TENSOR, automatic_axes, matrix_axes
from bitnet_kernels import FORMATS


def gathered(codes: Float[Array, "n k"], format: str, layer: str) -> Float[Array, "n k"]:
    """The same codes, no longer split over fsdp. Unchanged without that axis, or where it does not divide the matrix.

    Args:
      codes: integers that `format` holds; a NaN becomes one of them.
      format: a packed format, see bitnet_kernels.FORMATS.
      layer: the name of the linear layer, by which its weight is split (placement.matrix_axes).
    """
    sizes = automatic_axes()
    if sizes.get(FSDP, 1) == 1:
        return codes
    axes = matrix_axes(layer)
    per_byte = _fields_per_byte(format)
    packed_shape = codes.shape[0], codes.shape[1] // per_byte
    if codes.shape[1] % per_byte or any(
        size % sizes.get(axis, 1) for axis, size in zip(axes, packed_shape, strict=True)
    ):
        return codes
    return _gathered(codes, format, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(codes: Array, format: str, axes: tuple[str, str]) -> Array:
    split = PartitionSpec(*axes)
    packed = pack_bytes(jax.lax.with_sharding_constraint(codes, split), format)
    whole = PartitionSpec(*(axis if axis == TENSOR else None for axis in axes))
    # The barrier and the last constraint keep XLA from unpacking a part and gathering its floats.
    packed = jax.lax.with_sharding_constraint(packed, split)
    packed = jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(packed, whole))
    return jax.lax.with_sharding_constraint(unpack_bytes(packed, format), whole)


def _forward(codes: Array, format: str, axes: tuple[str, str]) -> tuple[Array, None]:
    return _gathered(codes, format, axes), None


def _backward(format: str, axes: tuple[str, str], _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, PartitionSpec(*axes)),)


_gathered.defvjp(_forward, _backward)


def _fields_per_byte(format: str) -> int:
    """Codes in a byte: as many fields of whole bits as fit."""
    return 8 // max(1, (len(FORMATS[format].values) - 1).bit_length())


def pack_bytes(codes: Float[Array, "n k"], format: str) -> UInt8[Array, "n bytes"]:
    """Consecutive codes of a row side by side in bytes, the first in the lowest bits."""
    values, fields = FORMATS[format].values, _fields_per_byte(format)
    numbers = ((codes - values.start) / values.step).astype(jnp.uint8)
    numbers = numbers.reshape(codes.shape[0], -1, fields)
    shifts = jnp.arange(fields, dtype=jnp.uint8)[None, None] * jnp.uint8(8 // fields)
    return jnp.sum(numbers << shifts, axis=-1, dtype=jnp.uint8)


def unpack_bytes(packed: UInt8[Array, "n bytes"], format: str) -> Float[Array, "n k"]:
    """The inverse of pack_bytes, in float32."""
    values, fields = FORMATS[format].values, _fields_per_byte(format)
    bits = 8 // fields
    shifts = jnp.arange(fields, dtype=jnp.uint8)[None, None] * jnp.uint8(bits)
    numbers = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return (numbers.astype(jnp.float32) * values.step + values.start).reshape(packed.shape[0], -1)
