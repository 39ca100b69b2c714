"""The multilayer perceptron of the first binary networks.

BinaryConnect (1511.00363) binarizes the weights, BNN (1602.02830) the activations too. The recipe selects between
them; the layout is the same, so that precisions can be compared.

    norm="batch"     x -> quantize -> product -> batch norm -> activation      BinaryConnect, BNN
    norm="rmsnorm"   x -> norm without gain -> quantize -> product -> activation      BitNetMCU
    norm="none"      x -> quantize -> product -> activation
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.models.transformer import Output
from bitnet_jax.nn.batch_norm import BatchNorm
from bitnet_jax.nn.config import Architecture, hashable, override_ends
from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.nn.norms import Norm
from bitnet_jax.quantization.recipes import Recipe, Rules

# hardtanh does not change the sign taken after it, nor its straight-through gradient within +-1. With "none" the
# quantizer is the only nonlinearity.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "hardtanh": jax.nn.hard_tanh,
    "relu": jax.nn.relu,
    "none": lambda x: x,
}
FORMATS = ("ternary2", "ternary5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryMLPConfig(Architecture):
    """Layers dense_0 ... dense_{num_layers - 1} of hidden_size units, then `classifier`.

    Raises:
      ValueError: a field is an unknown choice or not a positive integer.
    """

    image_size: int  # rows and columns of pixels
    channels: int = 1
    num_classes: int
    hidden_size: int
    num_layers: int = 3
    norm: str = "batch"
    activation: str = "hardtanh"
    init_std: float = 0.05
    precision: Rules = "bnn"
    first: Recipe = "float32"  # of dense_0, whose input is pixels
    last: Recipe = "float32"  # of the classifier
    ternary_format: str = "ternary2"

    def __post_init__(self) -> None:
        self._check(
            {
                "norm": ("batch", "rmsnorm", "none"),
                "activation": tuple(ACTIVATIONS),
                "ternary_format": FORMATS,
            },
            ("image_size", "channels", "num_classes", "hidden_size", "num_layers"),
        )
        for name in ("precision", "first", "last"):
            object.__setattr__(self, name, hashable(getattr(self, name)))
        self.precisions()

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        inputs = self.image_size**2 * self.channels
        sizes = [inputs] + [self.hidden_size] * self.num_layers
        shapes = {f"dense_{i}": (self.hidden_size, sizes[i]) for i in range(self.num_layers)}
        return shapes | {"classifier": (self.num_classes, self.hidden_size)}

    def module(self) -> nn.Module:
        return BinaryMLP(self)

    def example_input(self) -> Array:
        return jnp.zeros((1, self.image_size, self.image_size, self.channels), jnp.float32)

    def rules(self) -> Rules:
        return override_ends(self.precision, ("dense_0", self.first), ("classifier", self.last))


class BinaryMLP(nn.Module):
    """See the module docstring."""

    config: BinaryMLPConfig

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B height width C"],
        *,
        progress: Float[Array, ""] | float = 1.0,
        deterministic: bool = True,
    ) -> Output:
        config, precisions = self.config, self.config.precisions()
        hidden = x = images.reshape(images.shape[0], -1)
        for index, (path, (features, _)) in enumerate(config.linear_shapes().items()):
            if index:
                hidden = x = ACTIVATIONS[config.activation](x)
            norm = Norm("rmsnorm", use_scale=False, parent=None) if config.norm == "rmsnorm" else None
            layer = BitLinear(features, precisions[path], norm=norm, init_std=config.init_std, name=path)
            x = layer(x, progress)
            if config.norm == "batch":
                x = BatchNorm(name=f"{path}_norm")(x, deterministic)
        return Output(x.astype(jnp.float32), hidden)
