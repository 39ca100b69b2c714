"""Models, each one definition for training and for packed inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

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
    "config_fields",
    "config_kind",
    "init_variables",
    "model_config",
    "text_config",
]

# What the field `architecture` of a run's model section, or of a packed model's config.json, may say.
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


def init_variables(config: Architecture, key: PRNGKeyArray) -> dict[str, Any]:
    """Random parameters, and what else the model keeps in its first state, such as batch statistics."""
    inputs: Array = jnp.zeros((1, 1), jnp.int32)
    if size := getattr(config, "image_size", 0):
        inputs = jnp.zeros((1, size, size, getattr(config, "channels", 1)), jnp.float32)
    return dict(build_model(config).init(key, inputs))


def config_kind(fields: Mapping[str, Any]) -> type[Architecture]:
    """The config class that the field `architecture` names; without one it is a transformer.

    Raises:
      ValueError: an unknown architecture.
    """
    name = fields.get("architecture", "transformer")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"model.architecture: got {name!r}, expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name][0]


def model_config(fields: Mapping[str, Any]) -> Architecture:
    """The config of the kind that `architecture` names, from its other fields.

    Raises:
      ValueError: an unknown architecture, or an unknown, missing or wrong field.
    """
    kind = config_kind(fields)
    return kind.from_dict({name: value for name, value in fields.items() if name != "architecture"})


def text_config(config: Architecture) -> ModelConfig:
    """The config itself, which must be that of a Transformer on text.

    Raises:
      ValueError: it is that of a model of images.
    """
    if type(config) is not ModelConfig:
        raise ValueError(
            f"got a model of images ({config_fields(config)['architecture']}), expected a Transformer that reads text; "
            "`bitnet-jax predict` and `eval` take models of images"
        )
    return config


def config_fields(config: Architecture) -> dict[str, Any]:
    """The inverse of `model_config`: `architecture` and the fields of the config, plain values for JSON."""
    (name,) = [name for name, (kind, _) in ARCHITECTURES.items() if kind is type(config)]
    return {"architecture": name, **config.to_dict()}
