"""A character GPT with 0.2 M parameters on tiny-shakespeare: the babyBitNet benchmark.

    bitnet-jax train --config tiny_shakespeare --workdir runs/shakespeare

The settings of babyBitNet: 4 layers, d=64, 4 heads, context 32, batch 16, 5,000 steps, AdamW with default constants at
a constant learning rate (1e-3 float, 9e-4 ternary), pre-norm, plain ReLU MLP of 4d, float embeddings and head, 90/10
split. babyBitNet evaluates on 200 random held-out batches (102,400 characters), this config on consecutive windows of
the same length over all 111,540 held-out characters.

The small variant is the same model on the bytes of the standard library's text, which is available everywhere.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "small"):
        raise ValueError(f"tiny_shakespeare: got variant {variant!r}, expected base or small")
    small = variant == "small"
    config = ConfigDict()
    config.seed = 1337

    config.model = model = ConfigDict()
    model.vocab_size = 256 if small else 65  # bytes, or the characters of the file
    model.hidden_size = 64
    model.num_layers = 4
    model.num_heads = 4
    model.ffn_size = 256  # 4 d
    model.max_length = 32  # context
    model.mlp = "relu"
    model.position = "learned"
    model.norm_placement = "pre"
    model.attention_scale = 64**-0.5  # babyBitNet divides by sqrt(d_model), not sqrt(head_dim)
    model.tie_embeddings = False
    model.precision = "float32"

    config.data = data = ConfigDict()
    # Relative to data.root (default: environment variable BITNET_JAX_DATA).
    data.source = "stdlib" if small else "lm/tinyshakespeare.txt.gz"
    data.tokenizer = "byte" if small else "char"
    data.split = "tail"  # first 90 % train, last 10 % valid
    data.valid_fraction = 0.1
    data.length = 32
    data.batch_size = 16
    data.sampling = "windows"  # independent random windows, with replacement

    config.optimizer = optimizer = ConfigDict()
    optimizer.schedule = "constant"
    optimizer.learning_rate = 1e-3
    optimizer.warmup_steps = 0
    optimizer.beta2 = 0.999
    optimizer.weight_decay = 0.01
    optimizer.clip_norm = None

    config.training = training = ConfigDict()
    training.steps = 200 if small else 5000
    training.log_every = 50 if small else 100
    training.eval_every = 100 if small else 500
    training.checkpoint_every = 100 if small else 2500

    config.evaluation = evaluation = ConfigDict()
    evaluation.batches = 20 if small else None  # None: all held-out text, every character once
    return config
