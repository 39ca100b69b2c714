"""The products of a training step: integer codes times integer codes, and float32 in any layout.

Both are products of arrays as they are, unlike those of packed_matmul, whose matrix was packed once. "cpu" are the C++
kernels, "reference" is XLA. implementation=None selects "cpu" when compiling for CPU with the library present, else
"reference", with a warning on CPU. Under vmap the kernels run once per element. Neither has a gradient: they are what
gradients are made of (bitnet_jax/nn/products.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_kernels import cpu
from bitnet_kernels.packed import FORMATS

IMPLEMENTATIONS = ("cpu", "reference")


def code_matmul(
    x: jax.Array, w: jax.Array, format: str, *, dtype: str = "int8", implementation: str | None = None
) -> jax.Array:
    """int8 codes x [m, *g, k] times the transpose of codes w [n, *g, k] -> float32 [*g, m, n], g groups if any.

    Sums are exact in int32 and rounded once, to float32.

    Args:
      format: a packed format (FORMATS) that holds the codes of w. The kernels multiply in it; a code that it cannot
        hold gives an unspecified sum in the row of w where it stands, and there only.
      dtype: of the operands of XLA's product. "float32" and "bfloat16" are summed in float32, which is the same while
        sums stay below 2^24.

    Raises:
      ValueError: inconsistent shapes or dtypes, more inputs than int32 sums allow, an unknown name.
      NotImplementedError: the named implementation cannot be used here.
    """
    if x.dtype != np.int8 or w.dtype != np.int8:
        raise ValueError(f"got x {x.dtype}, w {w.dtype}; expected int8 codes")
    if x.ndim not in (2, 3) or x.shape[1:] != w.shape[1:]:
        raise ValueError(
            f"got x{list(x.shape)}, w{list(w.shape)}; expected [m, k] and [n, k], or with groups"
        )
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; expected one of {sorted(FORMATS)}")
    if dtype not in ("int8", "float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}; expected int8, float32 or bfloat16")
    if (k := x.shape[-1]) > (most := FORMATS[format].max_inputs):
        raise ValueError(f"got sums over {k} inputs, expected at most {most}, which int32 holds in {format}")
    by_xla = functools.partial(_codes_by_xla, dtype=dtype)
    kernels = functools.partial(_codes_by_kernels, format=format)
    return _call("products of codes", implementation, kernels, by_xla)(x, w)


def _codes_by_kernels(x: jax.Array, w: jax.Array, isa: str, format: str) -> jax.Array:
    m, n, groups = x.shape[0], w.shape[0], 1 if x.ndim == 2 else x.shape[1]
    sums = cpu.code_matmul(format, groups, isa)(x.reshape(m, -1), w.reshape(n, -1))
    return sums[0] if x.ndim == 2 else sums


def _codes_by_xla(x: jax.Array, w: jax.Array, dtype: str) -> jax.Array:
    axes = "mk,nk->mn" if x.ndim == 2 else "mgk,ngk->gmn"
    sums = jnp.int32 if dtype == "int8" else jnp.float32
    return jnp.einsum(axes, x.astype(dtype), w.astype(dtype), preferred_element_type=sums).astype(jnp.float32)


def float_matmul(
    a: jax.Array,
    b: jax.Array,
    *,
    transposed_a: bool = False,
    transposed_b: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """a [m, k] times the transpose of b [n, k] -> float32 [m, n]; an operand that is transposed is [k, m] or [k, n].

    "cpu" sums in a fixed order (kernels/csrc/float_matmul.h): an element is bit-identical across instruction sets,
    thread counts and other rows and columns. Both implementations are within (k + 1) * 2^-24 * sum |a_i b_i| of the
    exact sum.

    Args:
      a: float32.
      b: float32, or int8 codes, which are converted on the way.

    Raises:
      ValueError: inconsistent shapes or dtypes, an unknown name.
      NotImplementedError: the named implementation cannot be used here.
    """
    if a.dtype != np.float32 or b.dtype not in (np.float32, np.int8):
        raise ValueError(f"got a {a.dtype}, b {b.dtype}; expected float32, and float32 or int8")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0 if transposed_a else 1] != b.shape[0 if transposed_b else 1]:
        raise ValueError(
            f"got a{list(a.shape)}, b{list(b.shape)}, transposed_a={transposed_a}, transposed_b={transposed_b}; "
            "expected matrices with the same number of inputs"
        )
    by_xla = functools.partial(_floats_by_xla, transposed_a=transposed_a, transposed_b=transposed_b)
    kernels = functools.partial(_floats_by_kernels, transposed_a=transposed_a, transposed_b=transposed_b)
    return _call("products of training", implementation, kernels, by_xla)(a, b)


def _floats_by_kernels(
    a: jax.Array, b: jax.Array, isa: str, transposed_a: bool, transposed_b: bool
) -> jax.Array:
    return cpu.float_matmul(transposed_a, transposed_b, isa)(a, b)


def _floats_by_xla(a: jax.Array, b: jax.Array, transposed_a: bool, transposed_b: bool) -> jax.Array:
    axes = f"{'km' if transposed_a else 'mk'},{'kn' if transposed_b else 'nk'}->mn"
    return jnp.einsum(axes, a, b.astype(jnp.float32))


def _call(
    operation: str,
    implementation: str | None,
    kernels: Callable[..., jax.Array],
    by_xla: Callable[..., jax.Array],
) -> Callable[..., jax.Array]:
    """The implementation of an operation, of which `kernels` also takes the instruction set."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}; expected None or one of {IMPLEMENTATIONS}")
    _, isa = cpu.resolve(operation, implementation, cpu.unavailable())
    if isa is None:
        return by_xla
    branches: dict[str, Callable[..., jax.Array]] = {"cpu": functools.partial(kernels, isa=isa)}
    branches |= {"default": by_xla} if implementation is None else {}
    return functools.partial(jax.lax.platform_dependent, **branches)
