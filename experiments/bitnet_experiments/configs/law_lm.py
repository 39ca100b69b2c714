"""The language model for laws of loss in size, tokens and bits: bytes of Wikipedia, and a schedule for many durations.

    bitnet-jax train --config law_lm --workdir runs/law_lm
    bitnet-jax train --config law_lm:small --workdir runs/law_lm-small

The block of BitNet b1.58 2B-4T, as in study_lm. The learning rate is constant after its warm-up until the last fifth of
the run (warm-up, stable, decay), so that runs of several durations share their updates before the decay. The small
variant uses the text of the standard library, which is available everywhere.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from bitnet_experiments.configs import byte_lm


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"law_lm: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = byte_lm.get_config()

    model = config.model
    model.hidden_size = 64
    model.num_layers = 2
    model.ffn_size = 192
    model.max_length = 128
    model.embedding_dtype = "float32"

    data = config.data
    data.length = 128
    data.batch_size = 16
    data.sampling = "windows"  # independent random windows
    data.test = True
    if not small:
        data.source = "lm/enwiki2021.train.jsonl.gz"  # relative to data.root (default: $BITNET_JAX_DATA)
        data.valid_source = "lm/enwiki2021.valid.jsonl.gz"  # tested on; validated on a part of the other file
        data.valid_fraction = 0.02

    optimizer = config.optimizer
    optimizer.schedule = "wsd"
    optimizer.decay_share = 0.2
    optimizer.weight_decay = 0.0

    training = config.training
    training.steps = 100 if small else 1000
    training.log_every = 100
    training.statistics_every = 1000
    training.eval_every = training.steps
    training.checkpoint_every = 80 if small else 800  # where the decay begins

    config.evaluation.batches = 8 if small else 32  # 262,144 bytes
    config.evaluation.batch_size = 16 if small else 64
    return config
