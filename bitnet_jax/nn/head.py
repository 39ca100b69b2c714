"""The output head of a language model: the embedding table, a separate matrix, or integer codes of either."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.embedding import Embedding, rounded
from bitnet_jax.nn.linear import BitLinear, quantized_matmul
from bitnet_jax.quantization.scales import floats
from bitnet_kernels import PackedArray, packed_matmul


def next_token_logits(
    config: TransformerShape,
    embed: Embedding,
    x: Float[Array, "B T D"],
    progress: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B T V"]:
    """Logits in float32 from the head described by the config; an untied head is the submodule `lm_head`.

    head "int8", "int4"    codes of the embedding table (tied) or of `lm_head`, see QuantizedHead
    tied, head "float"     the embedding table
    else                   a linear layer with the Precision of the path `lm_head`; if float, an Embedding
    """
    if config.head != "float":
        return QuantizedHead(config, name="lm_head")(x, embed.table() if config.tie_embeddings else None)
    if config.tie_embeddings:
        return embed.attend(x)
    precision = config.precisions()["lm_head"]
    if not precision.quantizes_weights:
        return Embedding.head(config, precision).attend(x)
    return BitLinear.of(config, config.vocab_size, precision, "lm_head")(x.astype(jnp.float32), progress)


class QuantizedHead(nn.Module):
    """Logits from integer codes of a table and of its input, with the Precision of nn.tables.head_precision.

    The table is the rounded embedding table (`tied`) or a parameter `weight`, quantized in the forward pass. In a
    packed model the codes are the variable `weight` of the collection `packed`.
    """

    config: TransformerShape

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], tied: Float[Array, "V D"] | None = None
    ) -> Float[Array, "B T V"]:
        config, x = self.config, floats("x", x).astype(jnp.float32)
        shape = (config.vocab_size, config.hidden_size)
        if self.has_variable("packed", "weight"):
            weight: PackedArray = self.get_variable("packed", "weight")
            if weight.shape != shape:
                raise ValueError(f"lm_head: packed weight is {weight.shape}, expected {shape}")
            return packed_matmul(x, weight)
        if tied is None:
            tied = rounded(self._weight(), config.embedding_dtype)
        precision = config.precisions()["lm_head"]
        return quantized_matmul(
            precision.quantize_activation(x), precision.quantize_weight(tied), product=config.head_product
        )

    @nn.nowrap
    def _weight(self) -> Float[Array, "V D"]:
        """The latent weight of an untied head."""
        config = self.config
        init = nn.initializers.normal(config.init_std)
        return self.param("weight", init, (config.vocab_size, config.hidden_size), jnp.float32)

    @nn.nowrap
    def declared(
        self, x: Float[Array, "B T D"], tied: Float[Array, "V D"] | None = None
    ) -> Float[Array, "B T V"]:
        """Creates the parameters of the head, and returns zeros of the shape of its logits: for `eval_shape`."""
        if tied is None:
            self._weight()
        return jnp.zeros((*x.shape[:-1], self.config.vocab_size), jnp.float32)
