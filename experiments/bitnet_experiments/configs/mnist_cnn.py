"""A small convolutional network on MNIST: XNOR-Net, or Bi-Real Net with `model.shortcut`.

    bitnet-jax train --config mnist_cnn --workdir runs/mnist_cnn
    bitnet-jax train --config mnist_cnn:small --workdir runs/mnist_cnn-small

Everything except the model is as in mnist_mlp.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from bitnet_experiments.configs import mnist_mlp


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"mnist_cnn: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = mnist_mlp.get_config(variant)

    config.model = model = ConfigDict()
    model.architecture = "cnn"
    model.image_size = 16
    model.num_classes = 10
    model.widths = (8, 16) if small else (16, 32, 64)  # channels of the first convolution, then of each stage
    model.convolutions = 1 if small else 2  # per stage; the last one is pooled
    model.shortcut = False  # True: around every binary convolution, as in Bi-Real Net
    model.activation = "hardtanh"
    model.init_std = 0.05
    model.precision = "xnor"  # signs with the scales mean|w| per filter and mean|x| per window
    model.first = "float32"
    model.last = "float32"

    config.training.steps = 120 if small else 1200  # 2 epochs
    config.training.eval_every = 60 if small else 600
    config.training.checkpoint_every = 60 if small else 1200
    return config
