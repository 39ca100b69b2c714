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
    return PackedArray(_encode(jnp.asarray(codes), format), scale, format, layout, (n, k))


@jax.jit(static_argnames="format")
def _encode(codes: jax.Array, format: str) -> jax.Array:
    """int8 [n, k] -> uint8 [panels, blocks, 64]."""
    form = FORMATS[format]
    n, k = codes.shape
    panels, blocks, block_bytes = codes_shape(format, (n, k))
    # Binary -1, +1 -> 0, 1 and ternary -1, 0, +1 -> 0, 1, 2; padded after that, so padding bits are zero.
    fields = (codes > 0).astype(jnp.uint8) if form.bits == 1 else (codes + jnp.int8(1)).astype(jnp.uint8)
    fields = jnp.pad(fields, ((0, panels * PANEL_ROWS - n), (0, blocks * form.block_k - k)))
    fields = fields.reshape(panels, PANEL_ROWS, blocks, form.fields, 4)
    packed = jnp.zeros((panels, PANEL_ROWS, blocks, 4), jnp.uint8)
    for s in range(form.fields):
        packed |= fields[:, :, :, s] << jnp.uint8(form.bits * s)
    return packed.transpose(0, 2, 1, 3).reshape(panels, blocks, block_bytes)


def unpack(w: PackedArray) -> jax.Array:
    """The integer codes int8 [n, k] of a packed matrix; unpack(pack(codes, ...)) == codes."""
    return _decode(w.codes, w.format, w.shape)


@jax.jit(static_argnames=("format", "shape"))
def _decode(packed: jax.Array, format: str, shape: tuple[int, int]) -> jax.Array:
    """uint8 [panels, blocks, 64] -> int8 [n, k]."""
    form = FORMATS[format]
    (n, k), (panels, blocks, _) = shape, packed.shape
    # The four bytes of a row as one word: a quarter of the elements to transpose and shift.
    words = jax.lax.bitcast_convert_type(packed.reshape(panels, blocks, PANEL_ROWS, 4), jnp.uint32)
    words = words.transpose(0, 2, 1)[:, :, :, None]
    shifts = form.bits * jnp.arange(form.fields, dtype=jnp.uint32).reshape(1, 1, 1, form.fields)
    words = (words >> shifts) & jnp.uint32(0x01010101 * (2**form.bits - 1))
    fields = jax.lax.bitcast_convert_type(words, jnp.int8).reshape(panels * PANEL_ROWS, blocks * form.block_k)
    return (2 * fields - 1 if form.bits == 1 else fields - 1)[:n, :k]


def dequantize(w: PackedArray) -> jax.Array:
    """The float32 [n, k] matrix that w stands for: codes * scale, group by group."""
    n, k = w.shape
    codes = unpack(w).astype(jnp.float32).reshape(n, w.groups, w.group_size)
    return (codes * w.scale[:, :, None]).reshape(n, k)
