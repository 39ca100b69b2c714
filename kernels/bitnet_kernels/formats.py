"""Codecs between integer codes and packed bytes: the only place that knows the bit order.

The bit order itself is written down in PackedArray's docstring and drawn in kernels/README.md. All
functions are jnp: they run under jit, on any device, and under vmap.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels.packed import (
    FORMATS,
    LAYOUTS,
    PANEL_ROWS,
    PackedArray,
    codes_shape,
    validate_scale,
)


def pack(codes: jax.Array, scale: jax.Array, format: str, layout: str = "panel16") -> PackedArray:
    """Packs integer codes int8 [n, k] and their scale (shape rule of PackedArray).

    Raises ValueError for an unknown format or layout, a wrong dtype or shape, and, when the values can
    be seen (not under jit), for a code that the format cannot hold.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; expected one of {sorted(FORMATS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; expected one of {sorted(LAYOUTS)}")
    if codes.dtype != np.int8 or codes.ndim != 2 or min(codes.shape) < 1:
        raise ValueError(f"codes are {codes.dtype}{list(codes.shape)}; expected int8[n, k], n >= 1, k >= 1")
    n, k = codes.shape
    scale = jnp.asarray(scale)
    validate_scale(scale, (n, k))
    form = FORMATS[format]
    if not isinstance(codes, jax.core.Tracer):
        found = np.unique(np.asarray(codes))
        if not set(found.tolist()) <= set(form.values):
            raise ValueError(f"codes hold the values {found.tolist()}; {format} can hold {list(form.values)}")
    packed = _encode(jnp.asarray(codes), format, scale.shape[1])
    return PackedArray(packed, scale, format, layout, (n, k))


@jax.jit(static_argnames=("format", "groups"))
def _encode(codes: jax.Array, format: str, groups: int) -> jax.Array:
    """int8 [n, k] -> uint8 [panels, blocks, 64]."""
    form = FORMATS[format]
    n, k = codes.shape
    panels, blocks, block_bytes = codes_shape(format, (n, k), groups)
    # Padded as fields, so that padding is zero; in uint8, where code - lowest of int8 does not overflow.
    fields = (codes.astype(jnp.uint8) - jnp.uint8(form.values.start % 256)) // jnp.uint8(form.values.step)
    fields = fields.reshape(n, groups, k // groups)
    row_padding, group_padding = panels * PANEL_ROWS - n, blocks * form.block_k // groups - k // groups
    fields = jnp.pad(fields, ((0, row_padding), (0, 0), (0, group_padding)))
    fields = fields.reshape(panels, PANEL_ROWS, blocks, form.fields, 4)
    packed = sum(fields[:, :, :, s] * jnp.uint8(form.base**s) for s in range(form.fields))
    return packed.transpose(0, 2, 1, 3).reshape(panels, blocks, block_bytes)


def unpack(w: PackedArray) -> jax.Array:
    """The integer codes int8 [n, k] of a packed matrix; unpack(pack(codes, ...)) == codes."""
    return _decode(w.codes, w.format, w.shape, w.groups)


@jax.jit(static_argnames=("format", "shape", "groups"))
def _decode(packed: jax.Array, format: str, shape: tuple[int, int], groups: int) -> jax.Array:
    """uint8 [panels, blocks, 64] -> int8 [n, k]."""
    form = FORMATS[format]
    (n, k), (panels, blocks, _) = shape, packed.shape
    # The four bytes of a row as one word: a quarter of the elements to transpose.
    words = jax.lax.bitcast_convert_type(packed.reshape(panels, blocks, PANEL_ROWS, 4), jnp.uint32)
    row_bytes = jax.lax.bitcast_convert_type(words.transpose(0, 2, 1), jnp.uint8)
    fields = [_digit(row_bytes, s, form.base) for s in range(form.fields)]
    padded = jnp.stack(fields, axis=-2).reshape(panels * PANEL_ROWS, groups, blocks * form.block_k // groups)
    fields = padded[:n, :, : k // groups].reshape(n, k) * jnp.uint8(form.values.step)
    return (fields + jnp.uint8(form.values.start % 256)).astype(jnp.int8)


def _digit(byte: jax.Array, s: int, base: int) -> jax.Array:
    """Digit s of a uint8 in a base; base 256 has one digit and does not fit the type."""
    return byte if base == 256 else byte // jnp.uint8(base**s) % jnp.uint8(base)


def dequantize(w: PackedArray) -> jax.Array:
    """The float32 [n, k] matrix that w stands for: codes * scale, group by group."""
    n, k = w.shape
    codes = unpack(w).astype(jnp.float32).reshape(n, w.groups, w.group_size)
    return (codes * w.scale[:, :, None]).reshape(n, k)
