"""PackedArray: a weight matrix with 1 to 8 bits per element, as a pytree."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

BLOCK_BYTES = 64  # one AVX-512 vector, one cache line
PANEL_ROWS = 16  # rows of a panel, one 32-bit lane of a block each
LAYOUTS = {"panel16": "cpu", "column": "tpu", "plane": "gpu"}  # layout -> platform whose kernels use it
COLUMN_K = 256  # columns are padded to a multiple of it: whole 8-bit TPU tiles in every format
PLANE_ROWS, PLANE_K = 128, 512  # tile: rows of two warpgroups, inputs of one pipeline step


class Format(NamedTuple):
    """Encoding of codes in bytes: byte = sum over s of field_s * base^s, field = index of the code in `values`."""

    base: int
    fields: int  # P, codes per byte
    values: range  # the possible codes
    max_inputs: int = 2**18  # per scale group, without int32 overflow in any kernel
    layouts: tuple[str, ...] = ("panel16", "column")
    has_minimum: bool = False  # besides a scale

    @property
    def bits(self) -> float:
        """Stored bits per code."""
        return 8 / self.fields

    @property
    def block_k(self) -> int:
        """Inputs covered by one 64-byte block: four bytes per row."""
        return 4 * self.fields


FORMATS: dict[str, Format] = {
    "binary": Format(base=2, fields=8, values=range(-1, 2, 2), layouts=("panel16", "column", "plane")),
    "ternary2": Format(base=4, fields=4, values=range(-1, 2), layouts=("panel16", "column", "plane")),
    "ternary5": Format(base=3, fields=5, values=range(-1, 2), layouts=("panel16",)),
    "int4": Format(base=16, fields=2, values=range(-8, 8), max_inputs=2**17),
    "int8": Format(base=256, fields=1, values=range(-128, 128), max_inputs=2**16),
    "uint4": Format(
        base=16, fields=2, values=range(16), max_inputs=2**17, layouts=("panel16",), has_minimum=True
    ),
}
SCALE_DTYPES = ("float32", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedArray:
    """A matrix W [n, k] with W[r, c] = code(r, c) * scale(r, c), in the format uint4 + minimum(r, c).

    Invariants, checked by `validate` (n, k = shape; P codes per byte: binary 8, ternary2 4, ternary5 5, int4 and
    uint4 2, int8 1):

    * `format` is a key of FORMATS, `layout` one of its layouts, n >= 1, k >= 1.
    * `scale` is finite float32 or float16: [1, 1] per matrix, [n, 1] per output, or [n, G] per group of g = k / G
      inputs, g a multiple of 32; input c is in group c // g. Arithmetic converts it to float32, exactly.
    * `minimum` has the shape and dtype of `scale` and is finite in uint4, and is None in every other format.

    Layout panel16:

    * `codes` is uint8 [panels, blocks, 64] with panels = ceil(n / 16), blocks = G ceil(g / (4 P)): each group starts
      a new block.
    * byte 4 i + j of a block of panel p holds P fields as digits in base 2, 4, 3, 16 or 256, field 0 lowest;
      field s in block b of a group is the code of row 16 p + i and of input 4 P b + 4 s + j of the group.
    * a field is (code + 1) / 2 for binary, code + 1 for ternary2 (never 3) and ternary5, code + 8 for
      int4, code + 128 for int8, code for uint4.
    * fields of rows >= n and of inputs beyond their group are zero.

    Layout column, transposed: each column holds the inputs of one output:

    * `codes` is uint8 [K / P, n] with K = k rounded up to a multiple of 256.
    * byte q of column r holds inputs P q ... P q + P - 1 of row r, the first in the lowest bits, each in two's
      complement with 8 / P bits (ternary2: 00, 01 or 11; never 10).
    * binary has only the sign bit, 1 for -1: of the eight bytes that hold inputs 64 u ... 64 u + 63, byte q has
      input 64 u + 4 q + s in bit 2 s and input 64 u + 32 + 4 q + s in bit 2 s + 1.
    * codes of inputs >= k are arbitrary: kernels multiply them by zero.

    Layout plane, for binary and ternary2:

    * `codes` is uint8 [N, K / P] with N = n rounded up to a multiple of 128, K = k to a multiple of 512.
    * field s of byte j of the 512 / P bytes that hold inputs 512 b ... 512 b + 511 of a row is input
      512 b + s 512 / P + j; fields are as in panel16.
    * codes of rows >= n or inputs >= k are arbitrary, but a ternary2 field is never 3.

    `format`, `layout` and `shape` are static: PackedArrays of equal shape share compiled programs.
    Under vmap or scan the leaves may have leading axes; the invariants hold for each slice.
    """

    codes: jax.Array
    scale: jax.Array
    format: str = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    minimum: jax.Array | None = None

    def __repr__(self) -> str:
        """One line, without the arrays."""
        if not all(hasattr(leaf, "dtype") and hasattr(leaf, "size") for leaf in (self.codes, self.scale)):
            held = f"codes={self.codes}, scale={self.scale}"  # placeholders of tree functions
        else:
            held = f"groups={self.groups}, nbytes={self.nbytes}"
        return f"PackedArray({self.format}, {self.layout}, shape={self.shape}, {held})"

    @property
    def groups(self) -> int:
        """G: scale groups along the input."""
        return self.scale.shape[-1]

    @property
    def group_size(self) -> int:
        """Inputs per scale group (k for a single group)."""
        return self.shape[1] // self.groups

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and minimum."""
        scales = 1 if self.minimum is None else 2
        return self.codes.size + scales * self.scale.size * self.scale.dtype.itemsize


def codes_shape(
    format: str, shape: tuple[int, int], groups: int = 1, layout: str = "panel16"
) -> tuple[int, ...]:
    """The shape of the packed bytes of a matrix [n, k]; groups: scale groups along the input."""
    (n, k), form = shape, FORMATS[format]
    if layout == "column":
        return COLUMN_K * -(-k // COLUMN_K) // form.fields, n
    if layout == "plane":
        return PLANE_ROWS * -(-n // PLANE_ROWS), PLANE_K * -(-k // PLANE_K) // form.fields
    return -(-n // PANEL_ROWS), groups * -(-k // (groups * form.block_k)), BLOCK_BYTES


def validate(w: PackedArray, *, contents: bool = True) -> None:
    """Raises ValueError naming the first violated invariant of PackedArray.

    contents=False checks only names, shapes and dtypes. Values of traced arrays are never checked.
    """
    if w.format not in FORMATS:
        raise ValueError(f"format={w.format!r} is unknown; expected one of {sorted(FORMATS)}")
    if w.layout not in FORMATS[w.format].layouts:
        raise ValueError(f"layout={w.layout!r} of {w.format}; expected one of {FORMATS[w.format].layouts}")
    if len(w.shape) != 2 or min(w.shape) < 1:
        raise ValueError(f"shape={w.shape} of a packed matrix must be (n, k) with n >= 1 and k >= 1")
    validate_scale(w.scale, w.shape)
    validate_minimum(w.minimum, w.scale, w.format)
    expected = codes_shape(w.format, w.shape, w.groups, w.layout)
    if w.codes.shape != expected or w.codes.dtype != np.uint8:
        raise ValueError(
            f"codes are {w.codes.dtype}{list(w.codes.shape)}; expected uint8{list(expected)} "
            f"for a {w.format} matrix of shape {w.shape} in layout {w.layout}"
        )
    if contents and not isinstance(w.codes, jax.core.Tracer):
        _validate_contents(w)


def validate_scale(scale: jax.Array, shape: tuple[int, int]) -> None:
    """Raises ValueError unless scale is of SCALE_DTYPES, [1, 1], [n, 1] or [n, G] with a multiple of 32 inputs per
    group."""
    n, k = shape
    if scale.dtype.name not in SCALE_DTYPES:
        raise ValueError(f"scale is {scale.dtype}; expected {' or '.join(SCALE_DTYPES)}")
    if scale.ndim != 2 or scale.shape[0] not in (1, n) or scale.shape[1] < 1:
        raise ValueError(f"scale has shape {scale.shape}; expected (1, 1), ({n}, 1) or ({n}, groups)")
    groups = scale.shape[1]
    if groups > 1 and (scale.shape[0] != n or k % groups or (k // groups) % 32):
        raise ValueError(
            f"scale has shape {scale.shape}; with groups expected ({n}, G) where G divides k={k} "
            "into groups of a multiple of 32 inputs"
        )


def validate_minimum(minimum: jax.Array | None, scale: jax.Array, format: str) -> None:
    """Raises ValueError unless a format with a minimum has one like its scale, and any other format has none."""
    if not FORMATS[format].has_minimum:
        if minimum is not None:
            having = [name for name, form in FORMATS.items() if form.has_minimum]
            raise ValueError(f"got a minimum for {format}; expected none: only {', '.join(having)} has one")
    elif minimum is None:
        raise ValueError(f"got no minimum for {format}; expected {scale.dtype}{list(scale.shape)}")
    elif minimum.shape != scale.shape or minimum.dtype != scale.dtype:
        raise ValueError(
            f"minimum is {minimum.dtype}{list(minimum.shape)}; expected {scale.dtype}{list(scale.shape)}, as the scale"
        )


def _validate_contents(w: PackedArray) -> None:
    form, n = FORMATS[w.format], w.shape[0]
    codes, scale = np.asarray(w.codes), np.asarray(w.scale)
    if not np.isfinite(scale).all():
        raise ValueError("scale holds NaN or infinity; expected finite values")
    if w.minimum is not None and not np.isfinite(np.asarray(w.minimum)).all():
        raise ValueError("minimum holds NaN or infinity; expected finite values")
    low, high = (codes & 0x55, codes >> 1 & 0x55)  # of ternary2 fields
    if w.layout == "column":
        if w.format == "ternary2" and (high & ~low).any():
            raise ValueError("codes hold the field 2, which ternary2 does not define; expected 0, 1 or 3")
        return
    if w.format == "ternary2" and (high & low).any():
        raise ValueError("codes hold the field 3, which ternary2 does not define; expected 0, 1 or 2")
    if w.layout == "plane":
        return
    if codes.max() >= (defined := form.base**form.fields):
        raise ValueError(f"codes hold the byte {codes.max()}; {w.format} defines 0 to {defined - 1}")
    last_panel = codes[-1].reshape(-1, PANEL_ROWS, 4)
    rows = n - PANEL_ROWS * (codes.shape[0] - 1)
    if last_panel[:, rows:].any():
        raise ValueError(f"padding rows {n} to {PANEL_ROWS * codes.shape[0] - 1} are not zero")
    # Input 4 s + j in the last block of a group is field s of byte j.
    group_blocks = codes.shape[1] // w.groups
    last_blocks = codes.reshape(codes.shape[0], w.groups, group_blocks, PANEL_ROWS, 4)[:, :, -1]
    padded = form.block_k * group_blocks
    inputs = w.group_size - (padded - form.block_k)
    for s, field in enumerate(digits(last_blocks, form)):
        if field[..., max(0, min(4, inputs - 4 * s)) :].any():
            raise ValueError(f"padding inputs {w.group_size} to {padded - 1} of a group are not zero")


def digits(packed: np.ndarray, form: Format) -> list[np.ndarray]:
    """The fields of packed bytes, field 0 first: digits of each byte in the base of the format."""
    wide = packed.astype(np.int32)
    return [wide // form.base**s % form.base for s in range(form.fields)]
