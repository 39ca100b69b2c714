"""Embedding tables: lookup by id, and logits when the table is used as output head."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.context import from_rows, to_rows
from bitnet_jax.nn.linear import dense, quantized_matmul
from bitnet_jax.nn.placement import split_by_rows
from bitnet_jax.nn.tables import INTEGER_TABLES, table_precision
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.scales import floats
from bitnet_kernels import (
    PackedArray,
    bfloat16_logits,
    bfloat16_rows,
    dequantize,
    packed_matmul,
    packed_rows,
)
from bitnet_kernels.dtypes import integers


@jax.custom_jvp
def round_to_bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds to the nearest bfloat16 values, returned as float32, with a straight-through gradient."""
    # Not a pair of casts: XLA may remove those ("excess precision"), and packed would differ from latent.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@round_to_bfloat16.defjvp
def _round_to_bfloat16_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return round_to_bfloat16(primals[0]), tangents[0]


def rounded(rows: Float[Array, "*rows D"], stored_dtype: str) -> Float[Array, "*rows D"]:
    """Latent or stored rows of a table as used in the forward pass, in float32."""
    rows = rows.astype(jnp.float32)
    precision = table_precision(stored_dtype, rows.shape[-1])
    if precision is not None:
        return precision.quantize_weight(rows.reshape(-1, rows.shape[-1])).dequantize().reshape(rows.shape)
    return round_to_bfloat16(rows) if stored_dtype == "bfloat16" else rows


def stored_dtype(config: TransformerShape, name: str) -> str:
    """How the table `embed`, `position_embed` or `lm_head` is stored. Positions are too few to be integers."""
    integers = config.embedding_dtype in INTEGER_TABLES
    return "float32" if integers and name == "position_embed" else config.embedding_dtype


class Embedding(nn.Module):
    """A table [rows, D] of latent float32 values, rounded to `stored_dtype` in the forward pass.

    In a packed model the table itself has that dtype, and a bfloat16 table is multiplied without conversion. Integers
    are a PackedArray, the variable `weight` of the collection `packed`, in place of the parameter.
    `dtype` applies to looked-up vectors and to the operands of `attend`, except that a head of integers gets its input
    in 16 bits.
    """

    rows: int
    features: int
    stored_dtype: str
    dtype: str
    init_std: float
    parameter: str = "embedding"

    @classmethod
    def of(cls, config: TransformerShape, rows: int, name: str) -> Embedding:
        """The table described by a model config."""
        dtype = stored_dtype(config, name)
        return cls(rows, config.hidden_size, dtype, config.dtype, config.init_std, name=name)

    @classmethod
    def head(cls, config: TransformerShape, precision: Precision) -> Embedding:
        """An untied float head, with its table under the parameter name `weight`, as in linear layers."""
        return cls(
            config.vocab_size,
            config.hidden_size,
            config.embedding_dtype,
            "bfloat16" if "bfloat16" in (precision.compute_dtype, config.dtype) else "float32",
            config.init_std,
            parameter="weight",
            name="lm_head",
        )

    def setup(self) -> None:
        shape = (self.rows, self.features)
        if self.has_variable("packed", "weight"):
            self.stored: Array | PackedArray = self.get_variable("packed", "weight")
            if self.stored.shape != shape:
                raise ValueError(f"{self.name}: packed table is {self.stored.shape}, expected {shape}")
        else:
            init = nn.initializers.normal(self.init_std)
            self.stored = self.param(self.parameter, init, shape, jnp.float32)

    def table(self) -> Float[Array, "V D"]:
        """The table as used in the forward pass, in float32."""
        stored = self.stored
        return dequantize(stored) if isinstance(stored, PackedArray) else rounded(stored, self.stored_dtype)

    def __call__(self, indices: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        indices = integers("indices", indices)
        if isinstance(self.stored, PackedArray):
            return packed_rows(self.stored, indices).astype(self.dtype)
        # Look up before rounding: a decode step must not convert the whole table.
        if self.stored.dtype == jnp.bfloat16:
            return bfloat16_rows(self.stored, indices).astype(self.dtype)
        looked_up = jnp.take(split_by_rows(self.stored), indices, axis=0)
        return rounded(looked_up, self.stored_dtype).astype(self.dtype)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32: `x @ table.T`."""
        rows = to_rows(floats("x", x)).astype(jnp.float32)
        precision = table_precision(self.stored_dtype, self.features)
        if self.dtype == "bfloat16" and precision is None:
            rows = round_to_bfloat16(rows)
        if isinstance(self.stored, PackedArray):
            logits = packed_matmul(rows, self.stored, activation_bits=16)
        elif precision is not None:
            quantized = precision.quantize_activation(rows), precision.quantize_weight(self.stored)
            logits = quantized_matmul(*quantized, input_digits=precision.input_digits)
        elif self.stored.dtype == jnp.bfloat16:
            logits = bfloat16_logits(rows, self.stored)
        else:
            logits = dense(rows, self.table(), self.dtype)
        return from_rows(logits, x.shape[:-1])
