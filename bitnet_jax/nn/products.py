"""The matrix products of a linear layer and its gradients, and the arithmetic of each.

    sums[m, n] = sum_k x[m, k] w[n, k]         forward
    dx[m, k]   = sum_n dsums[m, n] w[n, k]     gradient to the input
    dw[n, k]   = sum_m dsums[m, n] x[m, k]     gradient to the weights

`product` selects which of the three use int8 operands and int32 accumulation. Those are exact, and GPU tensor cores
are specified for twice the rate of bfloat16.

    "float"           none: operands in `dtype`, sums in float32
    "int8"            the forward product. x and w must be integer codes in [-128, 127]. Same values and gradients as
                      "float", which is also exact while sums stay below 2^24.
    "int8_gradients"  also the gradient to the input. Values differ: dsums is rounded to int8.

dw stays in `dtype`: it sums over all tokens of a batch, where rounding would cost most. The split is that of
SwitchBack (2304.13013).

Autodiff saves the operands as multiplied: one byte per int8 code. A scan over layers keeps just that in memory; for
unrolled layers XLA may instead keep values from which it recomputes them, and on CPU it does.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.quantization.activations import int8

LONGEST_INT8_SUM = 2**17 - 1  # largest number of int8 products whose sum always fits int32
SMALLEST_GRADIENT = 1e-30  # a token with max|dsums| below it gets smaller codes; keeps 127 / max finite


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def sums_of_products(
    x: Float[Array, "m *g k"], w: Float[Array, "n *g k"], dtype: str = "float32", product: str = "float"
) -> Float[Array, "*g m n"]:
    """`x @ w.T` in float32, per group of inputs if there is an axis g.

    Args:
      dtype: "float32" or "bfloat16": operand dtype of every product that is not int8, forward and backward.
        bfloat16 represents integers up to 256 exactly, so codes lose nothing; dsums is rounded to it.
      product: "float", "int8" or "int8_gradients", see the module docstring.

    Raises:
      ValueError: more int8 products per sum than int32 is sure to hold.
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
        # Round to nearest: half the variance of stochastic rounding and no random bits for the m n entries. The cost
        # is a bias: entries below 1/254 of their token's largest become 0.
        quantized = int8(dsums, eps=SMALLEST_GRADIENT)  # per token and per group
        scale = quantized.scale if x.ndim == 2 else quantized.scale.swapaxes(0, 1)
        dx = _sums("gmn,ngk->mgk", quantized.codes.astype("int8"), w) * scale
    else:
        dx = _sums("gmn,ngk->mgk", rounded, w.astype(dtype))
    return dx, _sums("gmn,mgk->ngk", rounded, x.astype(dtype))


sums_of_products.defvjp(_forward, _backward)


def _sums(axes: str, a: Array, b: Array) -> Array:
    """jnp.einsum to float32, int8 accumulated in int32; the axis g is dropped for 2-D operands."""
    if a.ndim == 2:
        axes = axes.replace("g", "")  # a batch axis of size one would be slower
    if a.dtype != jnp.int8:
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
    length = a.shape[-1]
    if length > LONGEST_INT8_SUM:
        raise ValueError(
            f"product of int8 codes: got sums over {length}, expected at most {LONGEST_INT8_SUM}, which int32 holds; "
            "choose product='float'"
        )
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.int32).astype(jnp.float32)
