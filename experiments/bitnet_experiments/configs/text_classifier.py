"""A text classifier, float or with BiT's elastic binarization, from labels or from a teacher.

    bitnet-jax train --config text_classifier --workdir runs/teacher \\
        --config.model.precision=float32 --config.model.attention=softmax
    bitnet-jax train --config text_classifier --workdir runs/student \\
        --config.distillation.teacher=runs/teacher

TREC's questions as bytes, classified into six types of answer. For SST-2 and other data sets of the same format:
`--config.data.source=classify/sst2.train.jsonl.gz --config.data.valid_source=classify/sst2.valid.jsonl.gz
--config.model.num_classes=2`. The small variant predicts which of six keywords began a line of Python.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"text_classifier: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = ConfigDict()
    config.seed = 0
    config.task = "text_classification"

    config.model = model = ConfigDict()
    model.vocab_size = 256  # bytes
    model.num_classes = 6
    model.causal = False  # every token attends to every other
    model.hidden_size = 32 if small else 64
    model.num_layers = 1 if small else 2
    model.num_heads = 4
    model.ffn_size = 64 if small else 256
    model.mlp = "relu"  # its outputs are {0, a}
    model.attention = "binary"  # signs of queries and keys, probabilities {0, a}
    model.norm_placement = "pre"
    model.position = "learned"
    model.dropout = 0.1
    model.precision = "bit_relu"

    config.data = data = ConfigDict()
    data.source = "keywords" if small else "classify/trec.train.jsonl.gz"  # relative to data.root
    data.valid_source = config_dict.placeholder(str)
    if not small:
        data.valid_source = "classify/trec.test.jsonl.gz"
    data.tokenizer = "byte"
    data.length = 24 if small else 64  # T: longer texts are truncated, shorter ones padded
    data.valid_fraction = 0.1  # held out if there is no valid_source
    data.batch_size = 32

    config.optimizer = optimizer = ConfigDict()
    optimizer.schedule = "linear"
    optimizer.learning_rate = 2e-3
    optimizer.warmup_steps = 20 if small else 100
    optimizer.weight_decay = 0.01

    config.training = training = ConfigDict()
    training.steps = 160 if small else 2000  # 12 epochs of TREC
    training.log_every = 40 if small else 100
    training.statistics_every = 40 if small else 100
    training.eval_every = 80 if small else 250
    training.checkpoint_every = 80 if small else 2000

    config.evaluation = evaluation = ConfigDict()
    evaluation.batches = None  # all held-out texts
    evaluation.batch_size = 100

    config.distillation = distillation = ConfigDict()
    distillation.teacher = config_dict.placeholder(str)  # folder of another run of this task
    distillation.labels = 0.0  # BiT learns from the teacher only
    distillation.logits = 1.0
    distillation.temperature = 1.0
    distillation.relations = 0.0  # BiBERT's direction matching of queries, keys and values
    return config
