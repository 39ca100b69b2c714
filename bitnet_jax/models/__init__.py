"""Models, each one definition for training and for packed inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from bitnet_jax.models.binary_cnn import BinaryCNN, BinaryCNNConfig
from bitnet_jax.models.binary_mlp import BinaryMLP, BinaryMLPConfig
from bitnet_jax.models.presets import PRESETS
from bitnet_jax.models.transformer import Cache, Output, Transformer
from bitnet_jax.models.vision_transformer import VisionTransformer, VisionTransformerConfig
from bitnet_jax.nn.config import Architecture, ModelConfig

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "Architecture",
    "BinaryCNN",
    "BinaryCNNConfig",
    "BinaryMLP",
    "BinaryMLPConfig",
    "Cache",
    "ModelConfig",
    "Output",
    "Transformer",
    "VisionTransformer",
    "VisionTransformerConfig",
    "build_model",
    "model_config",
]

# What the field `architecture` of a run's model section may say.
ARCHITECTURES: dict[str, tuple[type[Architecture], type[Any]]] = {
    "transformer": (ModelConfig, Transformer),
    "mlp": (BinaryMLPConfig, BinaryMLP),
    "cnn": (BinaryCNNConfig, BinaryCNN),
    "vision_transformer": (VisionTransformerConfig, VisionTransformer),
}


def build_model(config: Architecture) -> nn.Module:
    """The module of a config."""
    (module,) = [module for kind, module in ARCHITECTURES.values() if kind is type(config)]
    return module(config)


def model_config(fields: Mapping[str, Any]) -> Architecture:
    """The config of the kind that `architecture` names (default: transformer), from its other fields.

    Raises:
      ValueError: an unknown architecture, or an unknown, missing or wrong field.
    """
    rest = dict(fields)
    name = rest.pop("architecture", "transformer")
    if name not in ARCHITECTURES:
        raise ValueError(f"model.architecture: got {name!r}, expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name][0].from_dict(rest)
