"""Dtypes that operations accept. Anything else is an error, never a silent conversion.

NumPy arrays first become JAX arrays, as in all JAX functions: float64 and int64 become float32 and int32 unless
jax_enable_x64 is set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

FLOATS = ("float32", "bfloat16", "float16")


def floats(name: str, x: ArrayLike) -> jax.Array:
    """x as an array with a dtype in FLOATS; `name` identifies it in the error.

    Raises:
      ValueError: x has another dtype.
    """
    array = jnp.asarray(x)
    if array.dtype.name not in FLOATS:
        raise ValueError(f"{name} is {array.dtype}; expected {', '.join(FLOATS[:-1])} or {FLOATS[-1]}")
    return array


def integers(name: str, x: ArrayLike) -> jax.Array:
    """x as an array of a signed or unsigned integer dtype, which excludes bool.

    Raises:
      ValueError: x has another dtype.
    """
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} is {array.dtype}; expected an integer type")
    return array
