"""The TPU backend: a Pallas kernel that unpacks blocks of weights into on-chip memory and multiplies them in int8.

A block has all inputs of some outputs. Its packed bytes are read from HBM once; two-bit fields are bitcast to int2 and
widened to int8, single bits need two more bitwise operations. The matrix unit then multiplies it with blocks of rows
of x, accumulating in int32, while the next block is fetched. For layout "column" of PackedArray.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bitnet_kernels import reference
from bitnet_kernels.batching import fold_batches
from bitnet_kernels.packed import COLUMN_K, FORMATS, PackedArray

LAYOUT = "column"
TILE_ROWS = 32  # of an int8 tile; rows of x are padded to a multiple
MAX_CHUNK_K = 512  # most inputs per product on the matrix unit

# VMEM budget of a kernel in bytes, by device kind: half of the VMEM of a core. Other devices use the compiler's
# default. `make tpu-compile` verifies that the kernels fit.
VMEM_BYTES = {"TPU v5 lite": 64 << 20, "TPU v5": 32 << 20, "TPU v6 lite": 64 << 20, "TPU7x": 32 << 20}
DEFAULT_VMEM_BYTES = 16 << 20
WITHOUT_INT8 = ("TPU v2", "TPU v3", "TPU v4")


def obstacle(w: PackedArray) -> str | None:
    """Why the kernel cannot use w, or None if it can."""
    if (kind := jax.devices()[0].device_kind) in WITHOUT_INT8:
        return f"the matrix unit of a {kind} has no int8 products"
    if _blocks(TILE_ROWS, w.format, w.shape[1], 1, _vmem_bytes(None)) is None:
        return f"k={w.shape[1]} inputs of 128 outputs do not fit the on-chip memory of a TPU"
    return None


def integer_matmul(
    x: jax.Array, w: PackedArray, *, device_kind: str | None = None, interpret: Any = False
) -> jax.Array:
    """int8 codes [m, k] times a packed matrix -> int32 [G, m, n]; the definition is reference.integer_matmul.

    device_kind: chip to compile for, a key of VMEM_BYTES; None: the first device of this process.
    interpret: True runs on any platform through XLA; pltpu.InterpretParams runs a simulator that detects races.
    """
    return _call(w.format, w.shape, w.groups, False, device_kind, interpret)(x, w.codes)


def scaled_matmul(
    x: jax.Array, w: PackedArray, *, device_kind: str | None = None, interpret: Any = False
) -> jax.Array:
    """int8 codes [m, k] times a packed matrix and its scale -> float32 [m, n]; see reference.rescale."""
    if w.groups == 1:  # XLA fuses this product into whatever follows
        return reference.rescale(integer_matmul(x, w, device_kind=device_kind, interpret=interpret), w.scale)
    return _call(w.format, w.shape, w.groups, True, device_kind, interpret)(
        x, w.codes, w.scale.T.astype(jnp.float32)
    )


def scaled_matmuls(x: jax.Array, ws: Sequence[PackedArray], **options: Any) -> tuple[jax.Array, ...]:
    """x [m, k], int8 codes or float32, times packed matrices and their scales -> float32 [m, n] for each."""
    return reference.scaled_matmuls(x, ws, functools.partial(scaled_matmul, **options))


@functools.cache
def _call(
    format: str, shape: tuple[int, int], groups: int, scaled: bool, device_kind: str | None, interpret: Any
) -> Callable[..., jax.Array]:
    """(x [m, k], codes, scale [G, n] if scaled) -> float32 [m, n] if scaled, else int32 [G, m, n]."""
    budget = _vmem_bytes(device_kind)

    def call(x: jax.Array, codes: jax.Array, *scale: jax.Array) -> jax.Array:
        (n, k), m, inputs = shape, x.shape[0], codes.shape[0] * FORMATS[format].fields
        chunk = _chunk(inputs if groups == 1 else k // groups)
        rows = TILE_ROWS * -(-m // TILE_ROWS)
        blocks = _blocks(rows, format, inputs, 1 if scaled else groups, budget)
        if blocks is None:
            raise NotImplementedError(f"{inputs} inputs do not fit {budget >> 20} MiB of on-chip memory")
        bm, bn = blocks
        # Chunks of inputs become a separate axis, because the kernel cannot index lanes.
        x = jnp.pad(x, ((0, rows - m), (0, inputs - k if groups == 1 else 0)))
        x = x.reshape(rows, -1, chunk).transpose(1, 0, 2)
        dtype, sums = (jnp.float32, ()) if scaled else (jnp.int32, (groups,))
        y = pl.pallas_call(
            functools.partial(_kernel, format=format, groups=groups, scaled=scaled),
            grid=(pl.cdiv(n, bn), pl.cdiv(rows, bm)),
            in_specs=[
                pl.BlockSpec((x.shape[0], bm, chunk), lambda j, i: (0, i, 0)),
                pl.BlockSpec((codes.shape[0], bn), lambda j, i: (0, j)),
                *[pl.BlockSpec((groups, bn), lambda j, i: (0, j)) for _ in scale],
            ],
            out_specs=pl.BlockSpec((*sums, bm, bn), lambda j, i: (*[0 for _ in sums], i, j)),
            out_shape=jax.ShapeDtypeStruct((*sums, rows, n), dtype),
            scratch_shapes=[pltpu.VMEM((inputs, bn), jnp.int8)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=budget
            ),
            interpret=interpret,
        )(x, codes, *scale)
        return y[..., :m, :]

    return fold_batches(call, rows_axis=0 if scaled else 1)


def _kernel(x_ref: Any, codes_ref: Any, *refs: Any, format: str, groups: int, scaled: bool) -> None:
    """x_ref [chunks, bm, chunk], codes_ref [K / P, bn], scale_ref [G, bn] if scaled, y_ref, w_ref [K, bn]."""
    *scale_ref, y_ref, w_ref = refs
    chunks, _, chunk = x_ref.shape
    block = y_ref.shape[-2:]

    @pl.when(pl.program_id(1) == 0)  # once for all blocks of rows of x
    def unpack_all() -> None:
        packed_rows = COLUMN_K // FORMATS[format].fields

        def unpack(i: jax.Array, none: None) -> None:
            packed = codes_ref[pl.ds(pl.multiple_of(i * packed_rows, packed_rows), packed_rows), :]
            w_ref[pl.ds(pl.multiple_of(i * COLUMN_K, COLUMN_K), COLUMN_K), :] = _unpack(packed, format)

        jax.lax.fori_loop(0, w_ref.shape[0] // COLUMN_K, unpack, None)

    def group_sums(group: jax.Array | int) -> jax.Array:
        def add_chunk(i: jax.Array, sums: jax.Array) -> jax.Array:
            c = group * (chunks // groups) + i
            w = w_ref[pl.ds(pl.multiple_of(c * chunk, chunk), chunk), :]
            dims = (((1,), (0,)), ((), ()))
            return sums + jax.lax.dot_general(x_ref[c], w, dims, preferred_element_type=jnp.int32)

        return jax.lax.fori_loop(0, chunks // groups, add_chunk, jnp.zeros(block, jnp.int32))

    if not scaled:

        def write(group: jax.Array, none: None) -> None:
            y_ref[group] = group_sums(group)

        jax.lax.fori_loop(0, groups, write, None)
        return

    def add_group(group: jax.Array, y: jax.Array) -> jax.Array:
        scale = scale_ref[0][pl.ds(group, 1), :]
        return y + reference.rounded(group_sums(group).astype(jnp.float32), scale)

    y_ref[...] = jax.lax.fori_loop(0, groups, add_group, jnp.zeros(block, jnp.float32))


def _unpack(packed: jax.Array, format: str) -> jax.Array:
    """uint8 [q, bn] in column layout -> int8 codes [P q, bn]."""
    if format == "int8":
        return pltpu.bitcast(packed, jnp.int8)
    if format != "binary":
        return pltpu.bitcast(packed, jnp.int4 if format == "int4" else jnp.int2).astype(jnp.int8)
    # Every other bit becomes the sign of an int2 that is 1 or -1. The 64 inputs in two words are two halves: the 32 in
    # the even bits, then the 32 in the odd bits.
    words = pltpu.bitcast(packed, jnp.int32)
    ones, signs = jnp.int32(0x55555555), jnp.int32(-0x55555556)
    halves = [
        pltpu.bitcast(ones | (bits & signs), jnp.int2).astype(jnp.int8).reshape(-1, 32, packed.shape[1])
        for bits in (words << 1, words)
    ]
    return jnp.stack(halves, axis=1).reshape(-1, packed.shape[1])


def _chunk(inputs: int) -> int:
    """Inputs per product: the largest divisor of a group that is a multiple of 32 and at most MAX_CHUNK_K."""
    return max(c for c in range(32, MAX_CHUNK_K + 1, 32) if inputs % c == 0)


def _blocks(rows: int, format: str, inputs: int, sums: int, budget: int) -> tuple[int, int] | None:
    """Largest (rows, outputs) of a block whose buffers fit the budget; sums: results per row and output."""
    for bn in (512, 256, 128):
        for bm in (512, 256, 128, 64, TILE_ROWS):
            weights = inputs * bn * (1 + 2 / FORMATS[format].fields)  # unpacked, plus two packed blocks
            rows_of_x = 2 * bm * inputs + 4 * bm * bn * (2 * sums + 2)
            if bm <= rows and weights + rows_of_x < 0.8 * budget:
                return bm, bn
    return None


def _vmem_bytes(device_kind: str | None) -> int:
    return VMEM_BYTES.get(device_kind or jax.devices()[0].device_kind, DEFAULT_VMEM_BYTES)
