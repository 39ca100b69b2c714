"""The largest logits of a bfloat16 head without reading most of it: an int8 copy finds the rows that matter.

The proof that none is missed stands in kernels/csrc/head_exact.h.
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
SMALLEST = 1e-30  # largest |x| of a row that still has digits; below it the bound alone decides


class TopLogits(NamedTuple):
    """Logits float32 [..., n], -inf where a row is no candidate; and the number of candidates, int32 [...]."""

    logits: jax.Array
    candidates: jax.Array


@jax.jit
def head_bounds(table: jax.Array, w: PackedArray) -> jax.Array:
    """float32 [2, n]: for each row t of a bfloat16 table [n, k] and its int8 copy w, at least |t - w| and |w|.

    Rounded up. With u = 2^-24, an element of t - w is computed as d, |t - w| <= |d| (1 + 2 u) + u |w|, and a sum
    of k squares, taken relative to the largest so that none underflows, has k + 8 roundings; 2^-100 is more than
    is lost to numbers flushed to zero.

    Raises:
      ValueError: the table is not bfloat16, or w no matrix of its shape.
    """
    if table.dtype != jnp.bfloat16 or table.shape != w.shape:
        raise ValueError(f"table is {table.dtype}{list(table.shape)}; expected bfloat16{list(w.shape)}")
    codes, scale = unpack(w).astype(jnp.float32), w.scale
    difference = table.astype(jnp.float32) - codes * scale
    up = np.float32(1 + (table.shape[1] + 16) * 2.0**-23)
    weight = _norm(codes) * scale[:, 0] * up + np.float32(2.0**-100)
    error = (_norm(difference) + weight * np.float32(2.0**-22)) * up + np.float32(2.0**-100)
    return jnp.stack([error, weight])


def _norm(rows: jax.Array) -> jax.Array:
    largest = absmax(rows, keepdims=True)
    # XLA multiplies by 1 / largest, which must neither be flushed to zero nor overflow.
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
    """The k largest logits of bfloat16_logits(x, table) of each row of x, bit for bit, and -inf for most others.

    Which rows of the table get their logit is proved from the int8 products and `bounds`: the k largest, all that
    equal the k-th, and those about which the bound cannot tell. The other logits are smaller than the k-th. So
    whatever looks at the k largest logits alone (the argmax, top-k sampling) cannot tell the difference.

    Args:
      x: float [..., inputs], of any value; a row with NaN or infinity has candidates only.
      table: bfloat16 [n, inputs].
      w: the table in int8, one scale a row; how well it fits decides the number of candidates and nothing else.
      bounds: head_bounds(table, w).
      k: at least 1; n or more: all rows are candidates.
      implementation: as in bfloat16_logits; "reference" takes every row for a candidate.

    Raises:
      ValueError: shapes, types or formats that do not fit.
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
        raise ValueError(f"k={k} of {inputs} inputs; expected k of at least 1, at most {MAX_INPUTS} inputs")
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
    sums = cpu.integer_matmul(digits.reshape(-1, rows.shape[1]), w, isa_name=isa)[0]
    return TopLogits(*cpu.exact_top_logits(rows, table, digits, scale, sums, w.scale, bounds, k, isa))


def _reference(rows: jax.Array, table: jax.Array) -> TopLogits:
    logits = bfloat16_logits(rows, table, implementation="reference")
    return TopLogits(logits, jnp.full(rows.shape[:1], table.shape[0], jnp.int32))


def two_digits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x float32 [m, k] ~ scale (high + low / 254): digits int8 [2, m, k], scale float32 [m].

    Nothing depends on how x was rounded: what the digits miss of x is measured and bounded.
    """
    largest = jnp.maximum(absmax(x, keepdims=True), SMALLEST)
    scaled = x * (127 / largest)
    high = jnp.round(scaled)
    low = jnp.round((scaled - high) * 254)
    digits = jnp.nan_to_num(jnp.clip(jnp.stack([high, low]), -127, 127)).astype(jnp.int8)
    return digits, largest[:, 0] / 127
