"""Embedding tables: lookup by id, and logits when the table is used as output head."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.linear import dense
from bitnet_jax.nn.placement import split_by_rows
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.scales import floats
from bitnet_kernels import bfloat16_logits, bfloat16_rows
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
    return round_to_bfloat16(rows) if stored_dtype == "bfloat16" else rows


class Embedding(nn.Module):
    """A table [rows, D] of latent float32 values, rounded to `stored_dtype` in the forward pass.

    In a packed model the table itself has that dtype, and a bfloat16 table is multiplied without conversion.
    `dtype` applies to looked-up vectors and to the operands of `attend`.
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
        return cls(rows, config.hidden_size, config.embedding_dtype, config.dtype, config.init_std, name=name)

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
        self.stored = self.param(self.parameter, nn.initializers.normal(self.init_std), shape, jnp.float32)

    def table(self) -> Float[Array, "V D"]:
        """The table as used in the forward pass, in float32."""
        return rounded(self.stored, self.stored_dtype)

    def __call__(self, indices: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        indices = integers("indices", indices)
        # Look up before rounding: a decode step must not convert the whole table.
        if self.stored.dtype == jnp.bfloat16:
            return bfloat16_rows(self.stored, indices).astype(self.dtype)
        looked_up = jnp.take(split_by_rows(self.stored), indices, axis=0)
        return rounded(looked_up, self.stored_dtype).astype(self.dtype)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32: `x @ table.T`."""
        rows = floats("x", x).reshape(-1, x.shape[-1]).astype(jnp.float32)
        if self.dtype == "bfloat16":
            rows = round_to_bfloat16(rows)
        if self.stored.dtype == jnp.bfloat16:
            logits = bfloat16_logits(rows, self.stored)
        else:
            logits = dense(rows, self.table(), self.dtype)
        return logits.reshape(*x.shape[:-1], self.rows)
