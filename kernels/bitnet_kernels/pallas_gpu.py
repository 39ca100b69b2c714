"""The GPU backend: a Mosaic GPU kernel for Hopper that feeds packed bits to the tensor cores from registers.

The product is computed transposed, W [n, k] times x^T, because `wgmma` accepts its first operand from registers. There
a single AND extracts four int8 values from a 32-bit word: field s of every byte, left in place, is the field times
base^s. Each field has a separate int32 accumulator, shifted once at the end; weights are moved only as packed bytes.
The top field, which occupies the sign bit of int8, is mapped by an XOR to base^s (field - base / 2). `integer_matmul`
corrects for both offsets with sums of x.

Two warpgroups multiply 64 outputs each while a third prefetches the next steps of 512 inputs. With few outputs the
inputs are split among blocks to occupy all multiprocessors. For layout "plane" of PackedArray.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bitnet_kernels import reference
from bitnet_kernels.batching import fold_batches
from bitnet_kernels.packed import FORMATS, PLANE_K, PLANE_ROWS, PackedArray

LAYOUT = "plane"
OLDEST_JAX = (0, 11)  # older plgpu.kernel has other arguments
CAPABILITY = "9.0"  # Hopper, the only generation with wgmma
MULTIPROCESSORS = 132  # H100 and H200
WARPGROUPS, WARPGROUP_ROWS = 2, 64
PIPELINE_BYTES = 200 << 10  # out of 227 KiB of shared memory
MAX_STEPS = 8  # in flight
ACCUMULATOR_ROWS = 256  # fields times rows of x: 128 registers per thread


def obstacle(w: PackedArray) -> str | None:
    """Why the kernel cannot use w, or None if it can."""
    if jax.__version_info__ < OLDEST_JAX:
        return (
            f"the GPU kernel needs jax {'.'.join(map(str, OLDEST_JAX))} or newer, this is {jax.__version__}"
        )
    if w.groups > 1:
        return f"the GPU kernel has one scale per output; got {w.groups} groups of inputs"
    device = jax.devices()[0]
    if device.platform == "gpu" and device.compute_capability != CAPABILITY:
        return f"the GPU kernel is for compute capability {CAPABILITY}, this is {device.compute_capability}"
    return None


def integer_matmul(x: jax.Array, w: PackedArray, *, interpret: Any = None) -> jax.Array:
    """int8 codes [m, k] times a packed matrix -> int32 [1, m, n]; the definition is reference.integer_matmul.

    interpret: parameters of Pallas's interpreter for GPU kernels, to run on any platform. It does not support
    register operands; int8 values then pass through shared memory.
    """
    return _call(w.format, w.shape, interpret)(x, w.codes)


def scaled_matmul(x: jax.Array, w: PackedArray, *, interpret: Any = None) -> jax.Array:
    """int8 codes [m, k] times a packed matrix and its scale -> float32 [m, n]; see reference.rescale."""
    return reference.rescale(integer_matmul(x, w, interpret=interpret), w.scale)


def scaled_matmuls(x: jax.Array, ws: Sequence[PackedArray], **options: Any) -> tuple[jax.Array, ...]:
    """x [m, k], int8 codes or float32, times packed matrices and their scales -> float32 [m, n] for each."""
    return reference.scaled_matmuls(x, ws, functools.partial(scaled_matmul, **options))


@functools.cache
def _call(format: str, shape: tuple[int, int], interpret: Any) -> Callable[..., jax.Array]:
    """(x [m, k], codes) -> int32 [1, m, n]."""
    form = FORMATS[format]

    def call(x: jax.Array, codes: jax.Array) -> jax.Array:
        (n, k), m = shape, x.shape[0]
        tile = next(
            (rows for rows in (8, 16, 32) if m <= rows), 64
        )  # rows of x per block: columns of a wgmma
        tile = min(tile, ACCUMULATOR_ROWS // form.fields)
        tiles = codes.shape[0] // PLANE_ROWS * -(-m // tile)
        steps = codes.shape[1] * form.fields // PLANE_K
        splits = min(steps, max(1, MULTIPROCESSORS // tiles))
        steps = -(-steps // splits)  # per split; inputs of x beyond the matrix are zero
        padded = jnp.pad(x, ((0, -m % tile), (0, splits * steps * PLANE_K - k)))
        fields = _matmul(form.fields, tile, splits, steps, interpret)(codes, padded).sum(0).T[:m, :n]

        # fields = sum over inputs of x field, but x (field - base / 2) for inputs in the top field
        wide = jnp.pad(x, ((0, 0), (0, -k % PLANE_K))).astype(jnp.int32)
        of_field = wide.reshape(m, -1, form.fields, PLANE_K // form.fields).sum((1, 3))
        fields = fields + form.base // 2 * of_field[:, -1:]
        values = form.values  # code = values.step field + values.start
        return (values.step * fields + values.start * of_field.sum(1, keepdims=True))[None]

    return fold_batches(call, rows_axis=1)


def _matmul(fields: int, tile: int, splits: int, steps: int, interpret: Any) -> Callable[..., jax.Array]:
    """(codes uint8 [N, K / P], x int8 [M, K']) -> int32 [splits, N, M]: products with fields, see module docs."""
    bits, width = 8 // fields, PLANE_K // fields

    def kernel(codes_gmem: Any, x_gmem: Any, sums_gmem: Any, sums_smem: Any, *values_smem: Any) -> None:
        outputs, rows, split, group = (jax.lax.axis_index(name) for name in ("n", "m", "split", "warpgroup"))
        group_rows = pl.ds(group * WARPGROUP_ROWS, WARPGROUP_ROWS)
        last_step = codes_gmem.shape[1] // width - 1

        def multiply(_: Any, codes_smem: Any, x_smem: Any, accumulators: Any) -> Any:
            codes = codes_smem[group_rows, :]
            for s, accumulator in enumerate(accumulators):
                values = codes & jnp.uint8((1 << bits) - 1 << bits * s)
                if s == fields - 1:
                    values = values ^ jnp.uint8(0x80)
                values = jax.lax.bitcast_convert_type(values, jnp.int8)
                if values_smem:
                    values_smem[0][group] = values
                    values = values_smem[0].at[group]
                x_of_field = x_smem.at[:, pl.ds(width * s, width)].transpose((1, 0))
                plgpu.wgmma(accumulator, values, x_of_field)
            plgpu.wgmma_wait(0)
            return accumulators

        def accumulate(pipeline: Callable[[Any], Any]) -> None:
            def scoped(*accumulators: Any) -> None:
                pipeline(accumulators)
                sums = accumulators[0][...]
                for s in range(1, fields):
                    shift = jnp.full(sums.shape, bits * s, jnp.int32)
                    sums += jax.lax.shift_right_arithmetic(accumulators[s][...], shift)
                sums_smem[group] = sums
                plgpu.commit_smem()
                place = pl.ds(outputs * PLANE_ROWS + group * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.copy_smem_to_gmem(
                    sums_smem.at[group], sums_gmem.at[split, place, pl.ds(rows * tile, tile)]
                )
                plgpu.wait_smem_to_gmem(0)

            accumulators = [plgpu.ACC((WARPGROUP_ROWS, tile), jnp.int32)] * fields
            pl.run_scoped(scoped, *accumulators)

        tiling = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width))
        step_bytes = PLANE_ROWS * width + tile * PLANE_K
        plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (PLANE_ROWS, width),
                    lambda i: (outputs, jnp.minimum(split * steps + i, last_step)),
                    transforms=tiling,
                ),
                plgpu.BlockSpec((tile, PLANE_K), lambda i: (rows, split * steps + i), transforms=tiling),
            ],
            max_concurrent_steps=min(steps, MAX_STEPS, PIPELINE_BYTES // step_bytes),
            compute_context=accumulate,
            num_compute_wgs=WARPGROUPS,
            wg_axis="warpgroup",
            memory_registers=40,
        )(codes_gmem, x_gmem)

    def call(codes: jax.Array, x: jax.Array) -> jax.Array:
        scratch = [plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS, tile), jnp.int32)]
        if interpret is not None:
            scratch.append(plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS, width), jnp.int8))
        return plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((splits, codes.shape[0], x.shape[0]), jnp.int32),
            scratch_types=scratch,
            grid=(codes.shape[0] // PLANE_ROWS, x.shape[0] // tile, splits),
            grid_names=("n", "m", "split"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            interpret=interpret,
        )(codes, x)

    return call
