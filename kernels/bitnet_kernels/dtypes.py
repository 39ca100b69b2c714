"""Which types of numbers an operation takes. Anything else is an error, never a silent conversion.

NumPy arrays become JAX arrays first, as in every function of JAX: float64 and int64 are float32 and int32 there, unless
jax_enable_x64 is set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

FLOATS = ("float32", "bfloat16", "float16")


def floats(name: str, x: ArrayLike) -> jax.Array:
    """x as an array of one of FLOATS; `name` says in the error what it is.

    Raises:
      ValueError: x has another dtype.
    """
    array = jnp.asarray(x)
    if array.dtype.name not in FLOATS:
        raise ValueError(f"{name} is {array.dtype}; expected {', '.join(FLOATS[:-1])} or {FLOATS[-1]}")
    return array


def integers(name: str, x: ArrayLike) -> jax.Array:
    """x as an array of integers, signed or not; bool is none.

    Raises:
      ValueError: x has another dtype.
    """
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} is {array.dtype}; expected an integer type")
    return array
