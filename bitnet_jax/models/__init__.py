"""Models, each one definition for training and for packed inference."""

from bitnet_jax.models.presets import PRESETS
from bitnet_jax.models.transformer import Cache, Output, Transformer
from bitnet_jax.nn.config import ModelConfig

__all__ = ["PRESETS", "Cache", "ModelConfig", "Output", "Transformer"]
