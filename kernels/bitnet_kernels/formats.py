"""Codecs between integer codes and packed bytes: the only Python code that depends on the bit order.

The bit order is specified in PackedArray's docstring and drawn in kernels/README.md. All functions are jnp: they run
under jit and vmap, on any device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels.dtypes import integers
from bitnet_kernels.packed import (
    FORMATS,
    PANEL_ROWS,
    PLANE_K,
    PackedArray,
    codes_shape,
    validate,
    validate_minimum,
    validate_scale,
)
from bitnet_kernels.rounding import unfused


def pack(
    codes: jax.Array,
    scale: jax.Array,
    format: str,
    layout: str = "panel16",
    *,
    minimum: jax.Array | None = None,
) -> PackedArray:
    """Packs integer codes int8 [n, k], their scale (for its shape see PackedArray) and, for uint4, their minimum.

    Raises:
      ValueError: an unknown format or layout, a wrong dtype or shape, or, unless traced, a code that the format
        cannot represent.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; expected one of {sorted(FORMATS)}")
    if layout not in FORMATS[format].layouts:
        raise ValueError(f"layout={layout!r} of {format}; expected one of {FORMATS[format].layouts}")
    if codes.dtype != np.int8 or codes.ndim != 2 or min(codes.shape) < 1:
        raise ValueError(f"codes are {codes.dtype}{list(codes.shape)}; expected int8[n, k], n >= 1, k >= 1")
    n, k = codes.shape
    scale = jnp.asarray(scale)
    validate_scale(scale, (n, k))
    minimum = None if minimum is None else jnp.asarray(minimum)
    validate_minimum(minimum, scale, format)
    form = FORMATS[format]
    if not isinstance(codes, jax.core.Tracer):
        found = np.unique(np.asarray(codes))
        if not set(found.tolist()) <= set(form.values):
            raise ValueError(f"codes hold the values {found.tolist()}; {format} can hold {list(form.values)}")
    encode, _ = _CODECS[layout]
    packed = encode(jnp.asarray(codes), format, scale.shape[1])
    return PackedArray(packed, scale, format, layout, (n, k), minimum)


def relayout(w: PackedArray, layout: str) -> PackedArray:
    """The same matrix, with identical codes, scale and minimum, in another layout."""
    return w if w.layout == layout else pack(unpack(w), w.scale, w.format, layout, minimum=w.minimum)


@jax.jit(static_argnames=("format", "groups"))
def _encode_panels(codes: jax.Array, format: str, groups: int) -> jax.Array:
    """int8 [n, k] -> uint8 [panels, blocks, 64]."""
    form = FORMATS[format]
    n, k = codes.shape
    panels, blocks, block_bytes = codes_shape(format, (n, k), groups)
    fields = _fields(codes, format)  # pad after conversion to fields, so that padding bits are zero
    fields = fields.reshape(n, groups, k // groups)
    row_padding, group_padding = panels * PANEL_ROWS - n, blocks * form.block_k // groups - k // groups
    fields = jnp.pad(fields, ((0, row_padding), (0, 0), (0, group_padding)))
    fields = fields.reshape(panels, PANEL_ROWS, blocks, form.fields, 4)
    packed = sum(fields[:, :, :, s] * jnp.uint8(form.base**s) for s in range(form.fields))
    return packed.transpose(0, 2, 1, 3).reshape(panels, blocks, block_bytes)


def unpack(w: PackedArray) -> jax.Array:
    """The integer codes int8 [n, k] of a packed matrix; unpack(pack(codes, ...)) == codes.

    Raises:
      ValueError: w violates an invariant of PackedArray other than those on its values.
    """
    validate(w, contents=False)
    _, decode = _CODECS[w.layout]
    return decode(w.codes, w.format, w.shape, w.groups)


def packed_rows(w: PackedArray, indices: jax.Array) -> jax.Array:
    """Rows of the matrix [n, k] that w represents, at integer indices [...] -> float32 [..., k].

    Equal to dequantize(w)[indices], but unpacks only these rows; NaN for out-of-range indices.

    Raises:
      ValueError: w violates an invariant of PackedArray, or the indices are not integers.
    """
    validate(w, contents=False)
    (n, k), flat = w.shape, integers("indices", indices).reshape(-1)
    inside = (flat >= 0) & (flat < n)
    flat = jnp.where(inside, flat, 0).astype(jnp.int32)
    m = flat.shape[0]
    if w.layout == "panel16":
        words = w.codes.reshape(*w.codes.shape[:2], PANEL_ROWS, 4)[flat // PANEL_ROWS, :, flat % PANEL_ROWS]
        codes = _decode_rows(words, w.format, (m, k), w.groups)
    else:
        _, decode = _CODECS[w.layout]
        chosen = jnp.take(w.codes, flat, axis=1 if w.layout == "column" else 0)
        codes = decode(chosen, w.format, (m, k), w.groups)

    def of_rows(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.shape[0] == 1 else jnp.take(leaf, flat, axis=0)

    rows = _scaled(codes, of_rows(w.scale), None if w.minimum is None else of_rows(w.minimum))
    return jnp.where(inside[:, None], rows, jnp.nan).reshape(*indices.shape, k)


def _fields(codes: jax.Array, format: str) -> jax.Array:
    """Codes as indices into the values of the format, computed in uint8, where code - lowest cannot overflow."""
    values = FORMATS[format].values
    return (codes.astype(jnp.uint8) - jnp.uint8(values.start % 256)) // jnp.uint8(values.step)


def _codes(fields: jax.Array, format: str) -> jax.Array:
    """The inverse of _fields."""
    values = FORMATS[format].values
    return (fields * jnp.uint8(values.step) + jnp.uint8(values.start % 256)).astype(jnp.int8)


@jax.jit(static_argnames=("format", "shape", "groups"))
def _decode_panels(packed: jax.Array, format: str, shape: tuple[int, int], groups: int) -> jax.Array:
    """uint8 [panels, blocks, 64] -> int8 [n, k]."""
    panels, blocks, _ = packed.shape
    # Treat the four bytes of a row as one word: a quarter of the elements to transpose.
    words = jax.lax.bitcast_convert_type(packed.reshape(panels, blocks, PANEL_ROWS, 4), jnp.uint32)
    row_bytes = jax.lax.bitcast_convert_type(words.transpose(0, 2, 1), jnp.uint8)
    return _decode_rows(row_bytes.reshape(panels * PANEL_ROWS, blocks, 4), format, shape, groups)


def _decode_rows(row_bytes: jax.Array, format: str, shape: tuple[int, int], groups: int) -> jax.Array:
    """The bytes of at least n rows of panels, uint8 [rows, blocks, 4] -> int8 [n, k]."""
    form, (n, k), (rows, blocks, _) = FORMATS[format], shape, row_bytes.shape
    fields = [_digit(row_bytes, s, form.base) for s in range(form.fields)]
    padded = jnp.stack(fields, axis=-2).reshape(rows, groups, blocks * form.block_k // groups)
    return _codes(padded[:n, :, : k // groups].reshape(n, k), format)


def _digit(byte: jax.Array, s: int, base: int) -> jax.Array:
    """Digit s of a uint8 in a base; base 256, which does not fit the type, has one digit."""
    return byte if base == 256 else byte // jnp.uint8(base**s) % jnp.uint8(base)


@jax.jit(static_argnames=("format", "groups"))
def _encode_columns(codes: jax.Array, format: str, groups: int) -> jax.Array:
    """int8 [n, k] -> uint8 [K / P, n]; independent of scale groups."""
    (n, k), form = codes.shape, FORMATS[format]
    rows, _ = codes_shape(format, (n, k), groups, "column")
    padded = jnp.pad(codes.T, ((0, rows * form.fields - k), (0, 0)))
    if format == "binary":  # [units, halves, 4 q + s] -> bit 2 s + half of byte q
        padded = padded.reshape(-1, 2, 8, 4, n).transpose(0, 2, 3, 1, 4)
        fields = (padded < 0).astype(jnp.uint8).reshape(rows, 8, n)
    else:
        fields = padded.astype(jnp.uint8).reshape(rows, form.fields, n) & jnp.uint8(form.base - 1)
    return _join(fields, form.base)


@jax.jit(static_argnames=("format", "shape", "groups"))
def _decode_columns(packed: jax.Array, format: str, shape: tuple[int, int], groups: int) -> jax.Array:
    """uint8 [K / P, n] -> int8 [n, k]."""
    (n, k), form = shape, FORMATS[format]
    fields = jnp.stack([_digit(packed, s, form.base) for s in range(form.fields)], axis=1)
    if format == "binary":
        signs = fields.reshape(-1, 8, 4, 2, n).transpose(0, 3, 1, 2, 4).reshape(-1, n)
        return (1 - 2 * signs.astype(jnp.int8))[:k].T
    left = 8 - 8 // form.fields  # shift the field to the top of the byte and back to extend its sign
    codes = (fields << left).astype(jnp.int8) >> left
    return codes.reshape(-1, n)[:k].T


@jax.jit(static_argnames=("format", "groups"))
def _encode_planes(codes: jax.Array, format: str, groups: int) -> jax.Array:
    """int8 [n, k] -> uint8 [N, K / P]."""
    (n, k), form = codes.shape, FORMATS[format]
    rows, row_bytes = codes_shape(format, (n, k), groups, "plane")
    fields = jnp.pad(_fields(codes, format), ((0, rows - n), (0, row_bytes * form.fields - k)))
    fields = fields.reshape(-1, form.fields, PLANE_K // form.fields)
    return _join(fields, form.base).reshape(rows, row_bytes)


@jax.jit(static_argnames=("format", "shape", "groups"))
def _decode_planes(packed: jax.Array, format: str, shape: tuple[int, int], groups: int) -> jax.Array:
    """uint8 [N, K / P] -> int8 [n, k]."""
    (n, k), form = shape, FORMATS[format]
    steps = packed.reshape(packed.shape[0], -1, 1, PLANE_K // form.fields)
    fields = jnp.concatenate([_digit(steps, s, form.base) for s in range(form.fields)], axis=2)
    return _codes(fields.reshape(packed.shape[0], -1)[:n, :k], format)


def _join(fields: jax.Array, base: int) -> jax.Array:
    """uint8 [rows, fields, columns] -> uint8 [rows, columns]: combines fields as digits of bytes."""
    return sum((fields[:, s] * jnp.uint8(base**s) for s in range(1, fields.shape[1])), start=fields[:, 0])


_CODECS = {
    "panel16": (_encode_panels, _decode_panels),
    "column": (_encode_columns, _decode_columns),
    "plane": (_encode_planes, _decode_planes),
}


def dequantize(w: PackedArray) -> jax.Array:
    """The float32 [n, k] matrix represented by w: codes * scale (+ minimum), group by group.

    The products are exact for float16 scales, which have 11 bits.
    """
    return _scaled(unpack(w), w.scale, w.minimum)


def _scaled(codes: jax.Array, scale: jax.Array, minimum: jax.Array | None) -> jax.Array:
    """codes int8 [n, k] * scale (+ minimum) [n or 1, G] -> float32 [n, k]."""
    (n, k), groups = codes.shape, scale.shape[1]
    values = codes.astype(jnp.float32).reshape(n, groups, k // groups) * scale.astype(jnp.float32)[:, :, None]
    if minimum is not None:
        values = unfused(values) + minimum.astype(jnp.float32)[:, :, None]
    return values.reshape(n, k)
