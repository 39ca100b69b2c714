"""A small convolutional network in the style of XNOR-Net and Bi-Real Net.

    conv_0 -> stages of binary convolutions -> mean over the pixels -> classifier

A convolution reads clipped inputs and is followed by batch norm. The last one of a stage is max-pooled before the
norm, while its outputs are still integer sums (XNOR-Net's order: max-pooling signs would nearly always give +1). With
`shortcut`, the input of every convolution but the first is added to its output (Bi-Real Net, 1808.00278), so that
real-valued sums bypass the signs. A shortcut is tiled where the channels grow and average-pooled where a stage ends.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.models.binary_mlp import ACTIVATIONS, FORMATS
from bitnet_jax.models.transformer import Output
from bitnet_jax.nn.batch_norm import BatchNorm
from bitnet_jax.nn.config import Architecture, hashable, override_ends
from bitnet_jax.nn.conv import BitConv
from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.quantization.recipes import Recipe, Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryCNNConfig(Architecture):
    """`widths` are the channels of conv_0 and of each stage; stage s has 3 x 3 convolutions conv_s_0, conv_s_1, ...

    Raises:
      ValueError: an unknown choice, a size that is not a positive integer, an image too small for the stages, or a
        shortcut between widths that do not divide each other.
    """

    image_size: int
    channels: int = 1
    num_classes: int
    widths: tuple[int, ...] | list[int] = (16, 32, 64)  # stored as a tuple
    convolutions: int = 1  # per stage
    shortcut: bool = False
    activation: str = "hardtanh"
    init_std: float = 0.05
    precision: Rules = "xnor"
    first: Recipe = "float32"  # of conv_0, whose input is pixels
    last: Recipe = "float32"  # of the classifier
    ternary_format: str = "ternary2"

    def __post_init__(self) -> None:
        self._check(
            {"activation": tuple(ACTIVATIONS), "ternary_format": FORMATS},
            ("image_size", "channels", "num_classes", "convolutions"),
        )
        widths = tuple(self.widths)
        if len(widths) < 2 or not all(isinstance(w, int) and w > 0 for w in widths):
            raise ValueError(
                f"model.widths: got {self.widths}, expected positive integers for conv_0 and a stage"
            )
        if self.shortcut and any(wide % narrow for narrow, wide in zip(widths, widths[1:], strict=False)):
            raise ValueError(f"model.widths: got {widths}, expected multiples of each other with a shortcut")
        if self.image_size < 2 ** (len(widths) - 1):
            raise ValueError(
                f"model.image_size: got {self.image_size}, expected at least {2 ** (len(widths) - 1)} "
                f"for {len(widths) - 1} stages, which halve it each"
            )
        object.__setattr__(self, "widths", widths)
        for name in ("precision", "first", "last"):
            object.__setattr__(self, name, hashable(getattr(self, name)))
        self.precisions()

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        shapes = {"conv_0": (self.widths[0], 9 * self.channels)}
        for stage in range(1, len(self.widths)):
            for i in range(self.convolutions):
                inputs = self.widths[stage - 1] if i == 0 else self.widths[stage]
                shapes[f"conv_{stage}_{i}"] = (self.widths[stage], 9 * inputs)
        return shapes | {"classifier": (self.num_classes, self.widths[-1])}

    def module(self) -> nn.Module:
        return BinaryCNN(self)

    def example_input(self) -> Array:
        return jnp.zeros((1, self.image_size, self.image_size, self.channels), jnp.float32)

    def rules(self) -> Rules:
        return override_ends(self.precision, ("conv_0", self.first), ("classifier", self.last))


def pooled(x: Float[Array, "B height width C"], kind: str) -> Float[Array, "B height//2 width//2 C"]:
    """2 x 2 pooling by "max" or "mean"; an odd last row or column is dropped."""
    B, height, width, C = x.shape
    even = x[:, : height // 2 * 2, : width // 2 * 2]
    squares = even.reshape(B, height // 2, 2, width // 2, 2, C)
    if kind == "mean":
        return squares.mean(axis=(2, 4))
    # The maximum alone may drop NaN, see bitnet_kernels.reference.absmax.
    return jnp.where(jnp.isnan(squares).any(axis=(2, 4)), jnp.nan, squares.max(axis=(2, 4)))


class BinaryCNN(nn.Module):
    """See the module docstring."""

    config: BinaryCNNConfig

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B height width C"],
        *,
        progress: Float[Array, ""] | float = 1.0,
        deterministic: bool = True,
    ) -> Output:
        config, precisions = self.config, self.config.precisions()
        activation = ACTIVATIONS[config.activation]

        def convolution(path: str, x: Array, pools: bool) -> Array:
            features = config.linear_shapes()[path][0]
            y = BitConv(features, precisions[path], init_std=config.init_std, name=path)(x, progress)
            return BatchNorm(name=f"{path}_norm")(pooled(y, "max") if pools else y, deterministic)

        x = convolution("conv_0", images, pools=False)
        for stage in range(1, len(config.widths)):
            for i in range(config.convolutions):
                pools = i == config.convolutions - 1
                y = convolution(f"conv_{stage}_{i}", activation(x), pools)
                if config.shortcut:
                    shortcut = pooled(x, "mean") if pools else x
                    y = y + jnp.tile(shortcut, (1, 1, 1, y.shape[-1] // shortcut.shape[-1]))
                x = y
        hidden = jnp.mean(activation(x), axis=(1, 2))
        head = BitLinear(
            config.num_classes, precisions["classifier"], init_std=config.init_std, name="classifier"
        )
        logits = BatchNorm(name="classifier_norm")(head(hidden, progress), deterministic)
        return Output(logits.astype(jnp.float32), hidden)
