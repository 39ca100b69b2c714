"""The largest logits of a bfloat16 head, reading only part of it: an int8 copy finds the candidate rows.

kernels/csrc/head_exact.h proves that none is missed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import cpu
from bitnet_kernels.formats import unpack
from bitnet_kernels.head import bfloat16_logits, check_operands, choose_isa
from bitnet_kernels.packed import PackedArray
from bitnet_kernels.reference import absmax

MAX_INPUTS = 2**16  # kMaxExactInputs in C++
SMALLEST = 1e-30  # smallest max|x| of a row with meaningful digits; below it only the bound decides


class TopLogits(NamedTuple):
    """Logits float32 [..., n], -inf for rows that are not candidates, and number of candidates int32 [...]."""

    logits: jax.Array
    candidates: jax.Array


@jax.jit
def head_bounds(table: jax.Array, w: PackedArray) -> jax.Array:
    """float32 [2, n]: upper bounds of |t - w| and |w| for each row t of a bfloat16 table [n, k] and its int8 copy w.

    With u = 2^-24, an element of t - w is computed as d with |t - w| <= |d| (1 + 2 u) + u |w|; a sum of k squares,
    relative to the largest so that none underflows, has k + 8 roundings; 2^-100 exceeds what flushing to zero loses.

    Raises:
      ValueError: the table is not bfloat16, or w has another shape.
    """
    if table.dtype != jnp.bfloat16 or table.shape != w.shape:
        raise ValueError(f"table is {table.dtype}{list(table.shape)}; expected bfloat16{list(w.shape)}")
    codes, scale = unpack(w).astype(jnp.float32), w.scale.astype(jnp.float32)
    difference = table.astype(jnp.float32) - codes * scale
    up = np.float32(1 + (table.shape[1] + 16) * 2.0**-23)
    weight = _norm(codes) * scale[:, 0] * up + np.float32(2.0**-100)
    error = (_norm(difference) + weight * np.float32(2.0**-22)) * up + np.float32(2.0**-100)
    return jnp.stack([error, weight])


def _norm(rows: jax.Array) -> jax.Array:
    largest = absmax(rows, keepdims=True)
    # XLA multiplies by 1 / largest, which must not be flushed to zero or overflow.
    unit = jnp.where(largest > 1, np.float32(2.0**-32), np.float32(2.0**32))
    relative = (rows * unit) / jnp.where(largest > 0, largest * unit, 1)
    return largest[:, 0] * jnp.sqrt(jnp.sum(relative * relative, axis=1))


def exact_top_logits(
    x: jax.Array,
    table: jax.Array,
    w: PackedArray,
    bounds: jax.Array,
    k: int,
    *,
    implementation: str | None = None,
) -> TopLogits:
    """The k largest logits per row of x, bit-identical to bfloat16_logits(x, table), and -inf for most others.

    The int8 products and `bounds` determine the candidate rows of the table: the k largest logits, all that equal the
    k-th, and those that the bound cannot exclude. All other logits are provably smaller than the k-th, so anything
    that uses only the k largest (argmax, top-k sampling) gives the same result.

    Args:
      x: float [..., inputs]; for a row with NaN or infinity all rows of the table are candidates.
      table: bfloat16 [n, inputs].
      w: the table in int8, one scale per row; its accuracy affects only the number of candidates.
      bounds: head_bounds(table, w).
      k: at least 1; for n or more, all rows are candidates.
      implementation: as in bfloat16_logits; with "reference" all rows are candidates.

    Raises:
      ValueError: inconsistent shapes, dtypes or formats.
      NotImplementedError: the named implementation cannot be used here.
    """
    x = jnp.asarray(x)
    check_operands(x, table)
    n, inputs = table.shape
    if w.format != "int8" or w.shape != table.shape or w.scale.shape != (n, 1):
        raise ValueError(
            f"w is {w.format}{list(w.shape)} with scales {list(w.scale.shape)}; expected int8{[n, inputs]} "
            f"with scales {[n, 1]}, the copy of the table"
        )
    if bounds.shape != (2, n) or bounds.dtype != np.float32:
        raise ValueError(f"bounds are {bounds.dtype}{list(bounds.shape)}; expected head_bounds(table, w)")
    if k < 1 or inputs > MAX_INPUTS:
        raise ValueError(f"got k={k}, {inputs} inputs; expected k >= 1 and at most {MAX_INPUTS} inputs")
    isa = choose_isa(implementation)
    rows = x.astype(jnp.float32).reshape(-1, inputs)
    if isa is None:
        result = _reference(rows, table)
    else:
        default = {"default": lambda rows, table, w, bounds: _reference(rows, table)}
        by_cpu = functools.partial(_by_cpu, k, isa)
        result = jax.lax.platform_dependent(
            rows, table, w, bounds, cpu=by_cpu, **(default if implementation is None else {})
        )
    return TopLogits(result.logits.reshape(*x.shape[:-1], n), result.candidates.reshape(x.shape[:-1]))


def _by_cpu(
    k: int, isa: str, rows: jax.Array, table: jax.Array, w: PackedArray, bounds: jax.Array
) -> TopLogits:
    digits, scale = two_digits(rows)
    w_scale = w.scale.astype(jnp.float32)
    sums = cpu.integer_matmul(digits.reshape(-1, rows.shape[1]), w, isa_name=isa)[0]
    return TopLogits(*cpu.exact_top_logits(rows, table, digits, scale, sums, w_scale, bounds, k, isa))


def _reference(rows: jax.Array, table: jax.Array) -> TopLogits:
    logits = bfloat16_logits(rows, table, implementation="reference")
    return TopLogits(logits, jnp.full(rows.shape[:1], table.shape[0], jnp.int32))


def two_digits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x float32 [m, k] ~ scale (high + low / 254): digits int8 [2, m, k], scale float32 [m].

    Correctness does not depend on this rounding: the kernel measures and bounds the residual.
    """
    largest = jnp.maximum(absmax(x, keepdims=True), SMALLEST)
    scaled = x * (127 / largest)
    high = jnp.round(scaled)
    low = jnp.round((scaled - high) * 254)
    digits = jnp.nan_to_num(jnp.clip(jnp.stack([high, low]), -127, 127)).astype(jnp.int8)
    return digits, largest[:, 0] / 127
