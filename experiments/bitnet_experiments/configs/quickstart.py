"""The models of `make quickstart`: the byte_lm setting, sized for a few minutes on two cores.

bitnet-jax train --config quickstart:short --workdir runs/quickstart-ternary
"""

from __future__ import annotations

from ml_collections import ConfigDict

from bitnet_experiments.configs import byte_lm


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "short"):
        raise ValueError(f"quickstart: got variant {variant!r}, expected base or short")
    config = byte_lm.get_config()
    config.training.steps = 1000
    config.training.eval_every = 100
    config.training.checkpoint_every = 250
    config.evaluation.batches = 16
    if variant == "short":  # for continuous integration: the same path in a fraction of the time
        config.training.steps = 100
        config.training.checkpoint_every = 50
        config.optimizer.warmup_steps = 10
        config.evaluation.batches = 4
    return config


def held_out_tokens(variant: str) -> int:
    """Tokens of held-out text that the final figures (models and trigram alike) are measured on."""
    return 32_768 if variant == "short" else 262_144
