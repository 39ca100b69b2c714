"""The matrix products of a linear layer and of its gradients, and what each is computed in.

    sums[m, n] = sum_k x[m, k] w[n, k]         forward
    dx[m, k]   = sum_n dsums[m, n] w[n, k]     gradient to the input
    dw[n, k]   = sum_m dsums[m, n] x[m, k]     gradient to the weights

A `product` says which of the three run on int8 operands with int32 sums. Those are exact, and the tensor cores of a
GPU are specified for twice as many a second as in bfloat16.

    "float"           none: operands in `dtype`, sums in float32
    "int8"            the forward product. x and w must be integer codes in [-128, 127]. The same numbers as "float",
                      which is exact too while sums stay below 2^24, and the same gradients.
    "int8_gradients"  the gradient to the input as well. Not the same numbers: dsums is rounded to int8.

dw stays in `dtype`: it adds up over all tokens of a batch, so rounding would cost most there. The split is that of
SwitchBack (2304.13013).

Autodiff keeps the operands as they were multiplied: a byte per int8 code. That is what a scan over layers holds in
memory; in layers compiled side by side XLA may keep something else to make them from, and on CPUs it does.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization.activations import int8

LONGEST_INT8_SUM = 2**17 - 1  # int32 holds the sum of so many products of int8 codes, whatever they are
SMALLEST_GRADIENT = 1e-30  # a token whose max|dsums| is below it gets smaller codes; 127 / it is finite


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def sums_of_products(
    x: Float[Array, "m *g k"], w: Float[Array, "n *g k"], dtype: str = "float32", product: str = "float"
) -> Float[Array, "*g m n"]:
    """`x @ w.T` in float32, of each group of inputs if there is an axis g.

    Args:
      dtype: "float32" or "bfloat16", of the operands of every product that is not int8, in both directions.
        bfloat16 holds integers up to 256 exactly, so codes lose nothing in it; dsums is rounded to it.
      product: "float", "int8" or "int8_gradients", see the module docstring.

    Raises:
      ValueError: sums over so many int8 products that int32 might not hold them.
    """
    return _forward(x, w, dtype, product)[0]


def _forward(x: Array, w: Array, dtype: str, product: str) -> tuple[Array, tuple[Array, Array]]:
    operand = dtype if product == "float" else "int8"
    x, w = x.astype(operand), w.astype(operand)
    return _sums("mgk,ngk->gmn", x, w), (x, w)


def _backward(dtype: str, product: str, saved: tuple[Array, Array], dsums: Array) -> tuple[Array, Array]:
    x, w = saved
    rounded = dsums.astype(dtype)
    if product == "int8_gradients":
        # To nearest: half the variance of stochastic rounding and no random bits, one for each of m n entries.
        # The price is a bias: entries below 1/254 of their token's largest become 0.
        codes, scale = int8(dsums, eps=SMALLEST_GRADIENT)  # per token, and per group
        dx = _sums("gmn,ngk->mgk", codes.astype("int8"), w) * (scale if x.ndim == 2 else scale.swapaxes(0, 1))
    else:
        dx = _sums("gmn,ngk->mgk", rounded, w.astype(dtype))
    return dx, _sums("gmn,mgk->ngk", rounded, x.astype(dtype))


sums_of_products.defvjp(_forward, _backward)


def _sums(axes: str, a: Array, b: Array) -> Array:
    """jnp.einsum to float32; without an axis g for operands of two axes. int8 is added up in int32."""
    if a.ndim == 2:
        axes = axes.replace("g", "")  # one group as a batch axis would be a slower product
    if a.dtype != jnp.int8:
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
    length = a.shape[-1]
    if length > LONGEST_INT8_SUM:
        raise ValueError(
            f"product of int8 codes: got sums over {length}, expected at most {LONGEST_INT8_SUM}, which int32 holds; "
            "choose product='float'"
        )
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.int32).astype(jnp.float32)
