"""A byte-level language model on real text, the base config of the language-model experiments.

    bitnet-jax train --config byte_lm --workdir runs/byte_lm
    bitnet-jax train --config byte_lm:small --workdir runs/small

The default corpus is the source code of Python's standard library, which is available everywhere.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"byte_lm: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = ConfigDict()
    config.seed = 0

    config.model = model = ConfigDict()
    model.vocab_size = 256  # bytes
    model.hidden_size = 64 if small else 128
    model.num_layers = 2 if small else 3
    model.num_heads = 4
    model.num_kv_heads = 2  # grouped-query attention, as in 2B-4T (4 query heads per kv head there)
    model.ffn_size = 128 if small else 1024
    model.max_length = 256 if small else 512  # maximum prompt plus generated text
    model.mlp = "relu2_glu"  # 2B-4T's gated squared ReLU
    model.norm_placement = "sub"  # 2B-4T's extra norm before o_proj and down_proj
    model.tie_embeddings = True
    model.embedding_dtype = "bfloat16"  # as in released checkpoints; packing preserves it exactly
    model.precision = "bitnet_b158"

    config.data = data = ConfigDict()
    data.source = "stdlib"  # or a path: text file, folder, .jsonl(.gz)
    data.tokenizer = "byte"
    data.split = "document"  # whole documents are held out, by a hash of their content
    data.valid_fraction = 0.05
    data.length = 64  # T
    data.batch_size = 8 if small else 16  # B
    data.sampling = "epoch"  # shuffled without replacement

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 3e-3
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 10 if small else 40
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0

    config.training = training = ConfigDict()
    training.steps = 60 if small else 1000
    training.log_every = 10 if small else 25
    training.eval_every = 30 if small else 250
    training.checkpoint_every = 30 if small else 250

    config.evaluation = evaluation = ConfigDict()
    evaluation.batches = 4 if small else 16  # of held-out text, the same in every evaluation

    config.mesh = mesh = ConfigDict()  # devices along each axis, see bitnet_jax/training/sharding.py
    mesh.data = 1
    mesh.fsdp = 1
    mesh.context = 1  # parts of a sequence; divides data.length
    mesh.tensor = 1
    return config
