"""The models of `make quickstart`: small language models on byte-level BPE tokens, sized for a minute on two cores.

bitnet-jax train --config quickstart:short --workdir runs/quickstart-ternary
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from bitnet_experiments.configs import byte_lm

VOCAB_SIZE = 512


def get_config(
    variant: str = "base",
    recipe: str = "bitnet_b158",
    source: str | Path = "stdlib",
    tokenizer: str | Path = "byte",
) -> ConfigDict:
    if variant not in ("base", "short"):
        raise ValueError(f"quickstart: got variant {variant!r}, expected base or short")
    config = byte_lm.get_config()
    config.model.vocab_size = VOCAB_SIZE
    config.model.num_layers = 2
    config.model.ffn_size = 384
    config.model.mlp = "silu_glu"
    config.model.norm_placement = "pre"
    config.model.init_std = 0.06  # about 0.7 / sqrt(hidden_size); the default 0.02 suits wider models
    config.model.precision = recipe
    config.data.source = str(source)
    config.data.tokenizer = str(tokenizer)
    config.data.valid_fraction = 0.1
    config.data.length = 256  # as long as the texts generated at the end
    config.data.batch_size = 4
    config.optimizer.learning_rate = 0.008
    config.optimizer.beta2 = 0.99
    config.training.steps = 256
    config.training.eval_every = 64
    config.training.checkpoint_every = 128
    config.training.statistics_every = 25  # as log_every
    config.evaluation.batches = 4
    config.evaluation.batch_size = 16
    if variant == "short":  # for continuous integration: the same steps in a fraction of the time
        config.training.steps = 60
        config.training.eval_every = 20
        config.training.checkpoint_every = 30
        config.optimizer.warmup_steps = 10
        config.evaluation.batches = 2
    return config
