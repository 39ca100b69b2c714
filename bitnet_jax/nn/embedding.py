"""Tables of vectors: look-ups by id, and the logits of an output head that is such a table."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bitnet_jax.nn.config import ModelConfig
from bitnet_jax.precision import Precision
from bitnet_kernels import bfloat16_logits, bfloat16_rows


@jax.custom_jvp
def round_to_bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest bfloat16 values, as float32; the gradient passes straight through."""
    # Not a pair of casts: XLA may drop those ("excess precision"), and packed would differ from latent.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@round_to_bfloat16.defjvp
def _round_to_bfloat16_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return round_to_bfloat16(primals[0]), tangents[0]


class Embedding(nn.Module):
    """A table [rows, D] of latent float32 values, rounded to `stored_dtype` wherever it is used.

    In a packed model the table itself has that type; a bfloat16 one is multiplied as it lies in memory.
    `dtype` is that of looked-up vectors and of the operands of `attend`.
    """

    rows: int
    features: int
    stored_dtype: str
    dtype: str
    init_std: float
    parameter: str = "embedding"

    @classmethod
    def of(cls, config: ModelConfig, rows: int, name: str) -> Embedding:
        """The table as a model config describes it."""
        return cls(rows, config.hidden_size, config.embedding_dtype, config.dtype, config.init_std, name=name)

    @classmethod
    def head(cls, config: ModelConfig, precision: Precision) -> Embedding:
        """A float head of its own, its rows under the name that every linear layer gives its matrix."""
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

    def _in_use(self, stored: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        values = stored.astype(jnp.float32)
        if self.stored_dtype == "bfloat16":
            values = round_to_bfloat16(values)
        return values.astype(self.dtype)

    def __call__(self, indices: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        # Looked up first: a step of generation must not convert the whole table.
        if self.stored.dtype == jnp.bfloat16:
            return bfloat16_rows(self.stored, indices).astype(self.dtype)
        return self._in_use(jnp.take(self.stored, indices, axis=0))

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32: the product of x with every row."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if self.dtype == "bfloat16":
            rows = round_to_bfloat16(rows)
        if self.stored.dtype == jnp.bfloat16:
            logits = bfloat16_logits(rows, self.stored)
        else:
            # As a product of matrices, see bitnet_jax.nn.linear.
            logits = jnp.einsum(
                "md,vd->mv",
                rows.astype(self.dtype),
                self._in_use(self.stored),
                preferred_element_type=jnp.float32,
            )
        return logits.reshape(*x.shape[:-1], self.rows)
