"""The language model of the studies: three seeds of twenty arms take an hour on two cores.

    bitnet-jax train --config study_lm --workdir runs/study_lm
    bitnet-jax train --config study_lm:small --workdir runs/study_lm-small

The block of BitNet b1.58 2B-4T (gated squared ReLU, grouped-query attention, a norm before o_proj and down_proj) on
the characters of tiny-shakespeare. With 27 thousand parameters, capacity limits the loss, so that the number of bits
matters. The small variant uses the text of the standard library, which is available everywhere. The learning rate is
byte_lm's and was not tuned for any arm of any study.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from bitnet_experiments.configs import byte_lm


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"study_lm: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = byte_lm.get_config()

    model = config.model
    model.hidden_size = 32
    model.num_layers = 2
    model.ffn_size = 96  # 3 d, close to 2B-4T's 2.7 d
    model.max_length = 64
    model.embedding_dtype = "float32"

    data = config.data
    data.length = 64
    data.batch_size = 16
    data.sampling = "windows"  # independent random windows
    if not small:
        model.vocab_size = 65  # characters of the file
        data.source = "lm/tinyshakespeare.txt.gz"  # relative to data.root (default: $BITNET_JAX_DATA)
        data.tokenizer = "char"
        data.split = "tail"  # first 90 % train, last 10 % valid
        data.valid_fraction = 0.1

    training = config.training
    training.steps = 150 if small else 1000  # of 1,024 tokens: one pass over the text
    training.log_every = 50
    training.statistics_every = 50
    training.eval_every = 50 if small else 250
    training.checkpoint_every = 150 if small else 500

    config.evaluation.batches = 20 if small else None  # None: all held-out text, every character once
    config.evaluation.batch_size = 64
    return config
