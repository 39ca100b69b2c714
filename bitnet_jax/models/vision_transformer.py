"""A vision transformer (ViT, 2010.11929): the Transformer's blocks over image patches, with mean pooling."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bitnet_jax.models.transformer import ModelConfig, Output, blocks, classify
from bitnet_jax.nn.config import hashable, override_ends
from bitnet_jax.nn.conv import patches
from bitnet_jax.nn.embedding import Embedding
from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.quantization.recipes import Recipe, Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(ModelConfig):
    """The image and the block fields of ModelConfig. Its token fields keep their defaults.

    Linear layers are those of the blocks, `patch_embed` [D, patch_size^2 channels] and `classifier`.

    Raises:
      ValueError: a field is an unknown choice, or sizes are inconsistent.
    """

    image_size: int
    channels: int = 1
    patch_size: int
    first: Recipe = "float32"  # of patch_embed, whose input is pixels

    vocab_size: int = 1
    max_length: int = 1  # set to the number of patches
    causal: bool = False
    position: str = "learned"
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        self._check({}, ("image_size", "channels", "patch_size", "num_classes"))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        if self.causal:
            raise ValueError("model.causal: got True, expected False; patches have no order")
        object.__setattr__(self, "max_length", (self.image_size // self.patch_size) ** 2)
        object.__setattr__(self, "first", hashable(self.first))
        super().__post_init__()

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        patch = (self.hidden_size, self.patch_size**2 * self.channels)
        return {"patch_embed": patch} | super().linear_shapes()

    def module(self) -> nn.Module:
        return VisionTransformer(self)

    def example_input(self) -> Array:
        return jnp.zeros((1, self.image_size, self.image_size, self.channels), jnp.float32)

    def rules(self) -> Rules:
        return override_ends(self.precision, ("patch_embed", self.first))


class VisionTransformer(nn.Module):
    """See the module docstring."""

    config: VisionTransformerConfig

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B height width C"],
        *,
        progress: Float[Array, ""] | float = 1.0,
        deterministic: bool = True,
    ) -> Output:
        config = self.config
        pixels = patches(images, config.patch_size, config.patch_size)
        B, T = pixels.shape[0], config.max_length
        embed = BitLinear(
            config.hidden_size,
            config.precisions()["patch_embed"],
            use_bias=config.use_bias,
            init_std=config.init_std,
            name="patch_embed",
        )
        x = embed(pixels.reshape(B, T, -1), progress).astype(config.dtype)
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        if config.position == "learned":
            x = x + Embedding.of(config, T, "position_embed")(positions)
        x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
        every = jnp.ones((B, T), bool)
        x, _ = blocks(
            self,
            config,
            x,
            positions=positions,
            visible=jnp.ones((B, T, T), bool),
            key_mask=every,
            cache=None,
            progress=progress,
            deterministic=deterministic,
        )
        return Output(classify(config, x, every, progress), x)
