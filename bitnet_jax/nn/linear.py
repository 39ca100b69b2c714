"""BitLinear: one linear layer in three states (float, fake-quantized latent, packed).

Both operands are multiplied as integer *codes*, and the scales are applied once, to the result:

    y = (x_codes @ w_codes.T) * w_scale * x_scale        (+ sum(x_codes) * w_minimum * x_scale if there is a minimum)

Products and sums of small integers are exact in float32 (while |sum| < 2^24), in any order. The latent layer in
float arithmetic and the packed layer in int32 arithmetic are therefore bit-identical.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from bitnet_jax.nn.adapter import COLLECTION, PARTS, adapter_output
from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.context import from_rows, to_rows
from bitnet_jax.nn.norms import Norm, projection_norm
from bitnet_jax.nn.packed_gather import gathered
from bitnet_jax.nn.products import sums_of_products
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.scales import Quantized, floats
from bitnet_jax.quantization.ste import straight_through
from bitnet_jax.quantization.warmup import blend, warm_up
from bitnet_kernels import PackedArray, packed_matmul, packed_matmuls
from bitnet_kernels.reference import digits, join_digits, rescale, rounded_product

# Names of the quantized inputs of linear layers for policies of jax.checkpoint.
KEPT_CODES, KEPT_SCALES = "codes", "scales"


def dense(
    x: Float[Array, "*rows k"], w: Float[Array, "n k"], dtype: str = "float32"
) -> Float[Array, "*rows n"]:
    """`x @ w.T` in float32, with operands rounded to `dtype`."""
    x, w = floats("x", x), floats("w", w)
    # Flattened to matrices: on CPU the gradient of a product with more axes takes XLA's slow path.
    return from_rows(sums_of_products(to_rows(x), w, dtype), x.shape[:-1])


def quantized_matmul(
    x: Quantized,
    w: Quantized,
    dtype: str = "float32",
    product: str = "float",
    input_digits: int = 1,
    format: str | None = None,
) -> Float[Array, "*rows n"]:
    """`x.dequantize() @ w.dequantize().T` in float32, with one exact integer sum per scale group.

    Args:
      x: codes [..., k], scale [..., 1].
      w: codes [n, k], scale [1 or n, G], and a minimum like scale or None; each group has k // G consecutive inputs.
      dtype, product, format: arithmetic of the product and its gradients, see bitnet_jax.nn.products.
      input_digits: int8 digits of the codes of x that are multiplied separately, as in `packed_product`.
    """
    if product != "float" or format is not None:
        x, w = _visible_nan(x), _visible_nan(w)
    multiply = functools.partial(_scaled_sums, w=w, dtype=dtype, product=product, format=format)
    y = multiply(x.codes) if input_digits == 1 else join_digits(*map(multiply, _digits(x.codes)))
    return rounded_product(y, x.scale)


def _scaled_sums(
    x: Float[Array, "*rows k"], w: Quantized, dtype: str, product: str, format: str | None
) -> Float[Array, "*rows n"]:
    """Integer codes times a quantized matrix, without the scale of the codes."""
    (n, k), groups = w.codes.shape, w.scale.shape[-1]
    rows, w_codes = to_rows(x), w.codes
    if groups > 1:
        rows, w_codes = rows.reshape(-1, groups, k // groups), w_codes.reshape(n, groups, k // groups)
    sums = sums_of_products(rows, w_codes, dtype, product, format).reshape(groups, -1, n)
    x_sums = None if w.minimum is None else rows.sum(axis=-1).reshape(-1, groups).T
    return from_rows(rescale(sums, w.scale, w.minimum, x_sums), x.shape[:-1])


def _digits(codes: Float[Array, "*rows k"]) -> tuple[Array, Array]:
    """The digits of codes; all of the gradient goes to the high one, which counts 256-fold."""
    high, low = digits(jax.lax.stop_gradient(codes))
    return straight_through(high, (codes,), (jnp.full_like(codes, 1 / 256),)), low


def _visible_nan(quantized: Quantized) -> Quantized:
    """Moves a NaN in the codes of a row to its scale, since int8 has no NaN."""
    has_nan = jnp.any(jnp.isnan(quantized.codes), axis=-1, keepdims=True)
    return quantized._replace(scale=jnp.where(has_nan, jnp.nan, quantized.scale))


def kept_codes(x: Quantized) -> Quantized:
    """The same input of a linear layer, by names under which a policy of jax.checkpoint can keep it: codes as int8."""
    x = _visible_nan(x)
    codes = checkpoint_name(jax.lax.stop_gradient(x.codes).astype(jnp.int8), KEPT_CODES)
    as_floats = codes.astype(x.codes.dtype)
    one = jnp.ones((1,) * as_floats.ndim, as_floats.dtype)
    return x._replace(
        codes=straight_through(as_floats, (x.codes,), (one,)), scale=checkpoint_name(x.scale, KEPT_SCALES)
    )


def packed_product(x: Quantized, w: PackedArray, precision: Precision) -> Float[Array, "*rows n"]:
    """`quantized_matmul` for a packed matrix, by the kernel that suits the codes of the input."""
    if precision.activation == "none":
        return packed_matmul(x.codes.astype(jnp.float32), w, activation_bits=None)
    bits = 1 if precision.input_is_signs else 8 * precision.input_digits
    codes = x.codes.astype(jnp.int16 if bits == 16 else jnp.int8)
    return rounded_product(packed_matmul(codes, w, activation_bits=bits), x.scale)


class BitLinear(nn.Module):
    """`y = quantized(norm(x)) @ quantized(weight).T + adapter(norm(x)) + bias`.

    Parameters: weight [n, k], bias [n] if `use_bias`, and the learned scales and thresholds of `precision`. With a
    variable `weight` (a PackedArray) in the collection `packed`, the layer has no parameter `weight` and calls
    `packed_matmul`. With a float Precision it is a plain dense layer, and a latent layer with a warm-up begins as one.
    The term of the adapter (nn/adapter.py) is there if the collection `adapter` has variables of the layer.

    Raises:
      ValueError: the packed weight does not fit the layer.
    """

    features: int
    precision: Precision
    use_bias: bool = False
    norm: Norm | None = None
    dtype: str = "float32"
    product: str = "float"  # of codes in training, see bitnet_jax.nn.products
    init_std: float = 0.02
    keep_codes: bool = False  # name the codes of the input for a policy of jax.checkpoint, see kept_codes

    @classmethod
    def of(cls, config: TransformerShape, features: int, precision: Precision, name: str) -> BitLinear:
        """The layer described by a model config; heads follow the final norm and have no norm or bias."""
        in_block = name not in ("lm_head", "classifier")
        return cls(
            features,
            precision,
            use_bias=in_block and name in config.biased,
            norm=projection_norm(config) if in_block else None,
            dtype=config.dtype,
            product=config.product if in_block else config.head_product,
            init_std=config.init_std,
            keep_codes=in_block and config.remat == "codes",
            name=name,
        )

    def packed_weight(self, k: int) -> PackedArray | None:
        """The packed matrix [features, k] that replaces the parameter `weight`, or None."""
        if not self.has_variable("packed", "weight"):
            return None
        weight: PackedArray = self.get_variable("packed", "weight")
        expected = (self.features, k)
        if weight.shape != expected:
            raise ValueError(f"{'/'.join(self.path)}: packed weight is {weight.shape}, expected {expected}")
        return weight

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*rows k"],
        progress: Float[Array, ""] | float = 1.0,
        product: Float[Array, "*rows n"] | None = None,
        quantized: Quantized | None = None,
    ) -> Float[Array, "*rows n"]:
        """The result has the dtype of x: float32, bfloat16 or float16; any other raises ValueError.

        Args:
          product: quantized(x) @ quantized(weight).T if apply_fused has already computed it.
          quantized: the quantized input, if apply_fused has.
        """
        dtype, inputs = x.dtype, floats("x", x)
        if self.norm is not None:
            inputs = self.norm(inputs)
        y = self._product(inputs, progress, quantized) if product is None else product
        if self.has_variable(COLLECTION, "a"):
            y = y + adapter_output(inputs, {name: self.get_variable(COLLECTION, name) for name in PARTS})
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + jnp.expand_dims(bias, range(y.ndim - 1))
        return y.astype(dtype)

    def _keys(self) -> tuple[Array | None, Array | None]:
        """PRNG keys for the codes of the input and of the weights; None for deterministic quantizers."""
        x_quantizer, w_quantizer = self.precision.activation_quantizer, self.precision.weight_quantizer
        draws_x, draws_w = x_quantizer.random, w_quantizer is not None and w_quantizer.random
        if not (draws_x or draws_w) or not self.has_rng("stochastic"):
            return None, None
        x_key, w_key = jax.random.split(self.make_rng("stochastic"))
        return x_key if draws_x else None, w_key if draws_w else None

    @property
    def keeps_codes(self) -> bool:
        return self.keep_codes and self.precision.codes_fit_int8 and self.precision.input_digits == 1

    @nn.nowrap
    def _activation_params(self, k: int) -> dict[str, Array]:
        """Learned arguments of the quantizer of the input."""
        return {
            name.removeprefix("activation_"): self.param(
                name, nn.initializers.constant(value), shape, jnp.float32
            )
            for name, (shape, value) in self.precision.activation_param_shapes(k).items()
        }

    @nn.nowrap
    def _weight_params(self, k: int) -> tuple[Array, Array | None]:
        """The latent weight [n, k] and its learned scale, if any."""
        precision = self.precision
        weight = self.param("weight", nn.initializers.normal(self.init_std), (self.features, k), jnp.float32)
        if not precision.quantizes_weights or precision.scale != "learned":
            return weight, None
        return weight, self.param("weight_scale", lambda _: precision.weight_scale_init(weight))

    @nn.nowrap
    def declared(
        self,
        x: Float[Array, "*rows k"],
        progress: Float[Array, ""] | float,
        quantized: Quantized | None = None,
    ) -> Float[Array, "*rows n"]:
        """Creates the parameters that `_product` would use, and returns zeros of its shape: for `eval_shape`."""
        if self.norm is not None:
            x = self.norm(x)
        self._activation_params(x.shape[-1])
        self._weight_params(x.shape[-1])
        return jnp.zeros((*x.shape[:-1], self.features), jnp.float32)

    def _product(
        self, x: Float[Array, "*rows k"], progress: Float[Array, ""] | float, quantized: Quantized | None
    ) -> Float[Array, "*rows n"]:
        precision, k = self.precision, x.shape[-1]
        packed = self.packed_weight(k)
        if packed is not None and precision.absmax_bits:
            return packed_matmul(x, packed, activation_bits=precision.absmax_bits)
        learned = self._activation_params(k)
        x_key, w_key = self._keys()
        x_quantized = quantized
        if x_quantized is None:
            x_quantized = precision.quantize_activation(x, **learned, progress=progress, key=x_key)
            if self.keeps_codes:
                x_quantized = kept_codes(x_quantized)

        if packed is not None:
            return packed_product(x_quantized, packed, precision)
        weight, scale = self._weight_params(k)
        if not precision.quantizes_weights:
            dtype = "bfloat16" if "bfloat16" in (precision.compute_dtype, self.dtype) else "float32"
            return dense(x_quantized.dequantize(), weight, dtype)
        w_quantized = precision.quantize_weight(weight, scale=scale, progress=progress, key=w_key)
        product = functools.partial(self._quantized_product, x_quantized, w_quantized)
        amount = warm_up(progress, precision.warmup)
        if isinstance(amount, float):
            return product()

        def blended() -> Array:
            x_mixed = blend(x, x_quantized.dequantize(), amount)
            return dense(x_mixed, blend(weight, w_quantized.dequantize(), amount), self.dtype)

        return jax.lax.cond(amount < 1, blended, product)

    @nn.nowrap
    def _quantized_product(self, x: Quantized, w: Quantized) -> Float[Array, "*rows n"]:
        precision = self.precision
        format = precision.packed_format if precision.codes_fit_int8 else None
        if format is not None:
            w = _visible_nan(w)
            w = w._replace(codes=gathered(w.codes, format, self.name or ""))
        return quantized_matmul(x, w, self.dtype, self.product, precision.input_digits, format)


def precisions_of(module: nn.Module, *inputs: Any, **arguments: Any) -> dict[str, Precision]:
    """Path of every BitLinear in a module -> its Precision, in the order of the forward pass.

    Args:
      inputs: what the module is called with, arrays or `jax.ShapeDtypeStruct`; nothing is computed.
      arguments: further arguments of the call, which stay Python values (`train=False`).
    """
    found: dict[str, Precision] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, BitLinear) and context.method_name == "__call__":
            found["/".join(context.module.path)] = context.module.precision
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(functools.partial(module.init, **arguments), jax.random.key(0), *inputs)
    return found


def apply_fused(
    layers: Sequence[BitLinear], x: Float[Array, "*rows k"], progress: Float[Array, ""] | float = 1.0
) -> list[Float[Array, "*rows n"]]:
    """Applies several layers to one input. Packed layers with the same input quantizer (q, k, v; gate, up) share the
    quantized input and run as one product; results are bit-identical to separate calls."""
    products: dict[str | None, Array] = {}
    for bits in (8, 16):
        alike = {
            layer.name: weight
            for layer in layers
            if layer.norm is None and layer.precision.absmax_bits == bits
            if (weight := layer.packed_weight(x.shape[-1])) is not None
        }
        if alike:
            products |= dict(
                zip(alike, packed_matmuls(x, list(alike.values()), activation_bits=bits), strict=True)
            )
    quantized = _quantized_for_all(layers, x, progress) if layers[0].keeps_codes and not products else None
    return [layer(x, progress, products.get(layer.name), quantized) for layer in layers]


def _quantized_for_all(
    layers: Sequence[BitLinear], x: Float[Array, "*rows k"], progress: Float[Array, ""] | float
) -> Quantized | None:
    """The input of layers that quantize it alike, so that its codes are kept once; None if they do not."""
    precision = layers[0].precision
    if any(layer.norm is not None or layer.precision != precision for layer in layers):
        return None
    if precision.activation_quantizer.random or precision.activation_param_shapes(x.shape[-1]):
        return None
    return kept_codes(precision.quantize_activation(floats("x", x), progress=progress))
