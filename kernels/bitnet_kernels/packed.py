"""PackedArray: a weight matrix of one or two bits per element, as a pytree."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

BLOCK_BYTES = 64  # one AVX-512 vector, one cache line
PANEL_ROWS = 16  # rows of a panel: one 32-bit lane of the block each
LAYOUTS = ("panel16",)


class Format(NamedTuple):
    """How many bits hold one code, and which codes there are."""

    bits: int
    values: tuple[int, ...]

    @property
    def fields(self) -> int:
        """Codes per byte."""
        return 8 // self.bits

    @property
    def block_k(self) -> int:
        """Inputs covered by one 64-byte block: four bytes per row."""
        return 4 * self.fields


FORMATS: dict[str, Format] = {
    "binary": Format(bits=1, values=(-1, 1)),
    "ternary2": Format(bits=2, values=(-1, 0, 1)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedArray:
    """A matrix W [n, k] with W[r, c] = code(r, c) * scale(r, c).

    Invariants (n, k = shape; `validate` checks just these):

    * `format` is a key of FORMATS, `layout` one of LAYOUTS, n >= 1, k >= 1.
    * `codes` is uint8 [panels, blocks, 64] with panels = ceil(n / 16), blocks = ceil(k / (4 P)),
      P codes per byte (binary 8, ternary2 4).
    * byte 4 i + j of block b in panel p holds P fields, field 0 in the lowest bits; field s is the
      code of row 16 p + i and input 4 P b + 4 s + j.
    * a binary field is 1 for +1 and 0 for -1; a ternary2 field is code + 1 (0, 1, 2; never 3).
    * every field of a row >= n or an input >= k is zero.
    * `scale` is finite float32: [1, 1] for the matrix, [n, 1] per output, or [n, G] per group of
      g = k / G inputs, g a multiple of 32; group of input c is c // g.

    `format`, `layout` and `shape` are static: two PackedArrays of one shape share a compilation.
    Under vmap or scan the leaves may carry leading axes; the invariants hold for each slice.
    """

    codes: jax.Array
    scale: jax.Array
    format: str = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def groups(self) -> int:
        """G: scale groups along the input."""
        return self.scale.shape[-1]

    @property
    def group_size(self) -> int:
        """Inputs per scale group (k when there is one group)."""
        return self.shape[1] // self.groups

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scale."""
        return self.codes.size + 4 * self.scale.size


def codes_shape(format: str, shape: tuple[int, int]) -> tuple[int, int, int]:
    """The shape [panels, blocks, 64] of the packed bytes of a matrix [n, k]."""
    n, k = shape
    return -(-n // PANEL_ROWS), -(-k // FORMATS[format].block_k), BLOCK_BYTES


def validate(w: PackedArray, *, contents: bool = True) -> None:
    """Raises ValueError naming the first broken invariant of PackedArray.

    contents=False checks names, shapes and dtypes only. The values of traced arrays cannot be seen and
    are skipped either way.
    """
    if w.format not in FORMATS:
        raise ValueError(f"format={w.format!r} is unknown; expected one of {sorted(FORMATS)}")
    if w.layout not in LAYOUTS:
        raise ValueError(f"layout={w.layout!r} is unknown; expected one of {sorted(LAYOUTS)}")
    if len(w.shape) != 2 or min(w.shape) < 1:
        raise ValueError(f"shape={w.shape} of a packed matrix must be (n, k) with n >= 1 and k >= 1")
    expected = codes_shape(w.format, w.shape)
    if w.codes.shape != expected or w.codes.dtype != np.uint8:
        raise ValueError(
            f"codes are {w.codes.dtype}{list(w.codes.shape)}; expected uint8{list(expected)} "
            f"for a {w.format} matrix of shape {w.shape} in layout {w.layout}"
        )
    validate_scale(w.scale, w.shape)
    if contents and not isinstance(w.codes, jax.core.Tracer):
        _validate_contents(w)


def validate_scale(scale: jax.Array, shape: tuple[int, int]) -> None:
    """Raises ValueError unless scale is float32 [1, 1], [n, 1] or [n, G] with groups of 32 t inputs."""
    n, k = shape
    if scale.dtype != np.float32:
        raise ValueError(f"scale is {scale.dtype}; expected float32")
    if scale.ndim != 2 or scale.shape[0] not in (1, n) or scale.shape[1] < 1:
        raise ValueError(f"scale has shape {scale.shape}; expected (1, 1), ({n}, 1) or ({n}, groups)")
    groups = scale.shape[1]
    if groups > 1 and (scale.shape[0] != n or k % groups or (k // groups) % 32):
        raise ValueError(
            f"scale has shape {scale.shape}; with groups expected ({n}, G) where G divides k={k} "
            "into groups of a multiple of 32 inputs"
        )


def _validate_contents(w: PackedArray) -> None:
    form, (n, k) = FORMATS[w.format], w.shape
    codes, scale = np.asarray(w.codes), np.asarray(w.scale)
    if not np.isfinite(scale).all():
        raise ValueError("scale holds NaN or infinity; expected finite values")
    if form.bits == 2 and (codes & (codes >> 1) & 0x55).any():
        raise ValueError(f"codes hold the field 3, which {w.format} does not define; expected 0, 1 or 2")
    last_panel = codes[-1].reshape(-1, PANEL_ROWS, 4)
    rows = n - PANEL_ROWS * (codes.shape[0] - 1)
    if last_panel[:, rows:].any():
        raise ValueError(f"padding rows {n} to {PANEL_ROWS * codes.shape[0] - 1} are not zero")
    # Bits of the last block that belong to inputs >= k; input 4 s + j of the block is field s of byte j.
    inputs = k - form.block_k * (codes.shape[1] - 1)
    padding = np.zeros(4, np.uint8)
    for c in range(inputs, form.block_k):
        padding[c % 4] |= ((1 << form.bits) - 1) << (form.bits * (c // 4))
    if (codes[:, -1].reshape(-1, 4) & padding).any():
        raise ValueError(f"padding inputs {k} to {form.block_k * codes.shape[1] - 1} are not zero")
