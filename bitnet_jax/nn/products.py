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

On a CPU, and without a mesh of several devices, the C++ kernels of `bitnet_kernels.products` compute what they can, in
place of XLA: codes whose packed format is known are multiplied as such whatever `product` (the sums are exact either
way), and so are rounded gradients; float32 gradients differ from XLA's in the order of their sums.

Autodiff saves the operands as multiplied: one byte per int8 code. A scan over layers keeps just that in memory; for
unrolled layers XLA may instead keep values from which it recomputes them, and on CPU it does where XLA multiplies.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.nn.placement import on_one_device
from bitnet_jax.quantization.activations import int8
from bitnet_kernels import FORMATS, code_matmul, float_matmul

LONGEST_INT8_SUM = 2**17 - 1  # largest number of int8 products whose sum always fits int32
FORWARD, TO_INPUT, TO_WEIGHTS = "mgk,ngk->gmn", "gmn,ngk->mgk", "gmn,mgk->ngk"
TRANSPOSED = {
    FORWARD: (False, False),
    TO_INPUT: (False, True),
    TO_WEIGHTS: (True, True),
}  # operands of float_matmul
SMALLEST_GRADIENT = 1e-30  # a token with max|dsums| below it gets smaller codes; keeps 127 / max finite


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def sums_of_products(
    x: Float[Array, "m *g k"],
    w: Float[Array, "n *g k"],
    dtype: str = "float32",
    product: str = "float",
    format: str | None = None,
) -> Float[Array, "*g m n"]:
    """`x @ w.T` in float32, per group of inputs if there is an axis g.

    Args:
      dtype: "float32" or "bfloat16": operand dtype of every product that is not int8, forward and backward.
        bfloat16 represents integers up to 256 exactly, so codes lose nothing; dsums is rounded to it.
      product: "float", "int8" or "int8_gradients", see the module docstring.
      format: the packed format of w if x are integer codes in [-128, 127] and w codes that it holds; None if not.

    Raises:
      ValueError: more int8 products per sum than int32 is sure to hold.
    """
    x, w = _operands(x, w, dtype, product, format)
    if x.dtype == jnp.int8:
        return _sums_of_codes(FORWARD, x, w, format, dtype if product == "float" else "int8")
    # Generation multiplies single rows, for which the kernels would spend their time on rearranging w.
    return jnp.einsum(_axes(FORWARD, x), x, w, preferred_element_type=jnp.float32)


def _operands(x: Array, w: Array, dtype: str, product: str, format: str | None) -> tuple[Array, Array]:
    as_codes = product != "float" or _multiplies_codes(format, x.shape[-1])
    operand = "int8" if as_codes else dtype
    return x.astype(operand), w.astype(operand)


def _forward(
    x: Array, w: Array, dtype: str, product: str, format: str | None
) -> tuple[Array, tuple[Array, Array]]:
    x, w = _operands(x, w, dtype, product, format)
    if x.dtype == jnp.int8:
        return _sums_of_codes(FORWARD, x, w, format, dtype if product == "float" else "int8"), (x, w)
    return _sums(FORWARD, x, w), (x, w)


def _backward(
    dtype: str, product: str, format: str | None, saved: tuple[Array, Array], dsums: Array
) -> tuple[Array, Array]:
    x, w = saved
    rounded = dsums.astype(dtype)
    if product == "int8_gradients":
        # Round to nearest: half the variance of stochastic rounding and no random bits for the m n entries. The cost
        # is a bias: entries below 1/254 of their token's largest become 0.
        quantized = int8(dsums, eps=SMALLEST_GRADIENT)  # per token and per group
        scale = quantized.scale if x.ndim == 2 else quantized.scale.swapaxes(0, 1)
        dx = _sums_of_codes(TO_INPUT, quantized.codes.astype("int8"), w, format) * scale
    else:
        dx = _sums(TO_INPUT, rounded, w)
    return dx, _sums(TO_WEIGHTS, rounded, x)


sums_of_products.defvjp(_forward, _backward)


@jax.custom_vjp
def ordered_product(x: Float[Array, "m k"], w: Float[Array, "n k"]) -> Float[Array, "m n"]:
    """`x @ w.T` of float32 matrices. On a CPU the sums have one order: an element has the same bits whatever the other
    rows are, in a forward pass alone and in one that is differentiated."""
    return _sums(FORWARD, x, w)


ordered_product.defvjp(
    lambda x, w: (_sums(FORWARD, x, w), (x, w)),
    lambda saved, dy: (_sums(TO_INPUT, dy, saved[1]), _sums(TO_WEIGHTS, dy, saved[0])),
)


def _multiplies_codes(format: str | None, k: int) -> bool:
    return format is not None and k <= FORMATS[format].max_inputs and on_one_device()


def _sums(axes: str, a: Array, b: Array) -> Array:
    """jnp.einsum of floats to float32; b may be codes. The axis g is dropped for 2-D operands."""
    if a.dtype == jnp.float32 and a.ndim == 2 and on_one_device():
        transposed_a, transposed_b = TRANSPOSED[axes]
        return float_matmul(a, b, transposed_a=transposed_a, transposed_b=transposed_b)
    return jnp.einsum(_axes(axes, a), a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _sums_of_codes(axes: str, a: Array, b: Array, format: str | None, dtype: str = "int8") -> Array:
    """jnp.einsum of int8 to float32, accumulated in int32; where XLA multiplies, operands have `dtype`."""
    length = a.shape[-1]
    if format is not None and _multiplies_codes(format, length) and (axes == FORWARD or a.ndim == 2):
        return code_matmul(a, b if axes == FORWARD else b.T, format, dtype=dtype)
    if length > LONGEST_INT8_SUM:
        raise ValueError(
            f"product of int8 codes: got sums over {length}, expected at most {LONGEST_INT8_SUM}, which int32 holds; "
            "choose product='float'"
        )
    return jnp.einsum(_axes(axes, a), a, b, preferred_element_type=jnp.int32).astype(jnp.float32)


def _axes(axes: str, a: Array) -> str:
    return axes if a.ndim == 3 else axes.replace("g", "")  # a batch axis of size one would be slower
