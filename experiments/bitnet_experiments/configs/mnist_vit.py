"""A binary vision transformer on MNIST: pixel patches, BiT's blocks (2205.13016), mean pooling, classifier.

bitnet-jax train --config mnist_vit --workdir runs/mnist_vit
bitnet-jax train --config mnist_vit:small --workdir runs/mnist_vit-small
"""

from __future__ import annotations

from ml_collections import ConfigDict

from bitnet_experiments.configs import mnist_mlp


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"mnist_vit: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = mnist_mlp.get_config(variant)

    config.model = model = ConfigDict()
    model.architecture = "vision_transformer"
    model.image_size = 16
    model.patch_size = 4  # 16 patches of 16 pixels
    model.num_classes = 10
    model.hidden_size = 32 if small else 64
    model.num_layers = 1 if small else 3
    model.num_heads = 4
    model.ffn_size = 64 if small else 256
    model.mlp = "relu"  # BiT uses it instead of GELU: its outputs are {0, a}
    model.attention = "binary"  # signs of queries and keys, probabilities {0, a}, softmax in between
    model.norm_placement = "pre"
    model.position = "learned"
    model.precision = "bit_relu"  # W1A1: {-a, a}, after a ReLU {0, a}; learned scales and thresholds
    model.first = "float32"  # patches are pixels; the classifier is float unless a rule names it

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20 if small else 100
    config.training.steps = 240 if small else 2400  # 4 epochs
    return config
