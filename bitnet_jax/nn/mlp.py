"""The feed-forward block: plain or gated, between two quantized projections."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.linear import BitLinear, apply_fused
from bitnet_jax.nn.norms import sub_norm
from bitnet_jax.quantization.precision import Precision


def relu2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(x, 0)^2` (Primer, 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu2": relu2,
    "gelu": jax.nn.gelu,  # the approximation by tanh
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),  # BERT's
    "silu_glu": jax.nn.silu,
    "relu2_glu": relu2,
}


class MLP(nn.Module):
    """`down(norm(f(up x)))`, or `down(norm(f(gate x) * up x))` if gated; with a norm only for placement "sub"."""

    config: TransformerShape
    precisions: Mapping[str, Precision]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], progress: Float[Array, ""] | float = 1.0
    ) -> Float[Array, "B T D"]:
        config, activation = self.config, ACTIVATIONS[self.config.mlp]

        def linear(name: str, features: int) -> BitLinear:
            return BitLinear.of(config, features, self.precisions[name], name)

        inner = [linear(name, config.ffn_size) for name in config.mlp_linears if name != "down_proj"]
        *gate, up = apply_fused(inner, x, progress)
        hidden = activation(gate[0]) * up if gate else activation(up)
        return linear("down_proj", config.hidden_size)(sub_norm(config, hidden, progress), progress)
