"""Models: one definition each for training and packed inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import PRNGKeyArray

from bitnet_jax.models.binary_cnn import BinaryCNN, BinaryCNNConfig
from bitnet_jax.models.binary_mlp import BinaryMLP, BinaryMLPConfig
from bitnet_jax.models.presets import PRESETS
from bitnet_jax.models.transformer import Cache, ModelConfig, Output, Transformer
from bitnet_jax.models.vision_transformer import VisionTransformer, VisionTransformerConfig
from bitnet_jax.names import check_name
from bitnet_jax.nn.config import Architecture

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
    "config_fields",
    "config_kind",
    "init_variables",
    "model_config",
    "text_config",
]

# The values of the field `architecture` in the model section of a run or the config.json of a packed model.
ARCHITECTURES: dict[str, type[Architecture]] = {
    "transformer": ModelConfig,
    "mlp": BinaryMLPConfig,
    "cnn": BinaryCNNConfig,
    "vision_transformer": VisionTransformerConfig,
}


def init_variables(config: Architecture, key: PRNGKeyArray) -> dict[str, Any]:
    """Randomly initialized variables: parameters and any other collections, such as batch statistics."""
    return dict(config.module().init(key, config.example_input()))


def config_kind(fields: Mapping[str, Any]) -> type[Architecture]:
    """The config class named by the field `architecture` (default "transformer").

    Raises:
      ValueError: an unknown architecture.
    """
    name = fields.get("architecture", "transformer")
    check_name("model.architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def model_config(fields: Mapping[str, Any]) -> Architecture:
    """The config of the class named by `architecture`, from the other fields.

    Raises:
      ValueError: an unknown architecture, or an unknown, missing or invalid field.
    """
    kind = config_kind(fields)
    return kind.from_dict({name: value for name, value in fields.items() if name != "architecture"})


def text_config(config: Architecture) -> ModelConfig:
    """The config itself, checked to be that of a text Transformer.

    Raises:
      ValueError: it belongs to an image model.
    """
    if type(config) is not ModelConfig:
        raise ValueError(
            f"got an image model ({config_fields(config)['architecture']}), expected a Transformer that reads text; "
            "`bitnet-jax predict` and `eval` accept image models"
        )
    return config


def config_fields(config: Architecture) -> dict[str, Any]:
    """The inverse of `model_config`: `architecture` and the fields of the config, as plain JSON values.

    Raises:
      ValueError: the config class is not in ARCHITECTURES.
    """
    names = {kind: name for name, kind in ARCHITECTURES.items()}
    if type(config) not in names:
        raise ValueError(
            f"got a {type(config).__name__}, expected a config class with a registered name; "
            "add it to bitnet_jax.models.ARCHITECTURES"
        )
    return {"architecture": names[type(config)], **config.to_dict()}
