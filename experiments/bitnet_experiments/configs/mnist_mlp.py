"""A multilayer perceptron on MNIST, the base config of the early binary networks.

    bitnet-jax train --config mnist_mlp --workdir runs/mnist_mlp
    bitnet-jax train --config mnist_mlp:small --workdir runs/mnist_mlp-small

The layout is that of BNN (1602.02830): product, batch norm, hard tanh, sign; first and last layers float. Narrower, on
smaller images and trained for fewer epochs than in the papers: minutes on two cores. The small variant uses synthetic
images.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"mnist_mlp: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = ConfigDict()
    config.seed = 0
    config.task = "images"

    config.model = model = ConfigDict()
    model.architecture = "mlp"
    model.image_size = 16  # pixels per side, as in BitNetMCU
    model.num_classes = 10
    model.hidden_size = 64 if small else 256
    model.num_layers = 3  # hidden layers
    model.norm = "batch"  # after each product
    model.activation = "hardtanh"  # preserves the sign of its input
    model.init_std = 0.05  # of latent weights, which are clipped to [-1, 1]
    model.precision = "bnn"  # weights and activations +-1
    model.first = "float32"  # pixels are not signs
    model.last = "float32"

    config.data = data = ConfigDict()
    # Relative to data.root (default: environment variable BITNET_JAX_DATA).
    data.source = "drawn" if small else "vision/mnist"
    data.image_size = 16  # 28 x 28 shrunk by area averaging
    data.batch_size = 50 if small else 100

    config.optimizer = optimizer = ConfigDict()
    optimizer.schedule = "linear"  # to 0
    optimizer.learning_rate = 3e-3  # BNN's initial learning rate
    optimizer.weight_decay = 0.0  # latent weights are clipped instead
    optimizer.beta2 = 0.999
    optimizer.clip_norm = None

    config.training = training = ConfigDict()
    training.steps = 240 if small else 3000  # 5 epochs of 60,000
    training.log_every = 40 if small else 100
    training.statistics_every = 40 if small else 100
    training.eval_every = 80 if small else 600  # one epoch
    training.checkpoint_every = 80 if small else 3000

    config.evaluation = evaluation = ConfigDict()
    evaluation.batches = None  # all held-out images
    evaluation.batch_size = 500
    return config
