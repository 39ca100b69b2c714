"""A small float model with random weights, as a folder, and a text for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax.data import ByteTokenizer
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.model_folders import LoadedModel, save_model
from bitnet_jax.models import ModelConfig, init_variables

CONFIG = ModelConfig(
    vocab_size=257, hidden_size=32, ffn_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_length=32,
    norm_placement="pre", mlp="silu_glu", attention_bias="qkv", precision="float32", init_std=0.1,
)  # fmt: skip
TEXT = " ".join(f"{i} ternary weights are minus one, zero and one;" for i in range(60))


def saved(folder: Path, config: ModelConfig = CONFIG, **leaves: Any) -> Path:
    """A float model with random weights, of which `leaves` replace some; names have __ for /."""
    flat = flatten_dict(init_variables(config, jax.random.key(0))["params"], sep="/")
    for path in flat:
        if path.endswith("bias"):
            flat[path] = jax.random.normal(jax.random.key(1), flat[path].shape)
    flat |= {name.replace("__", "/"): leaf for name, leaf in leaves.items()}
    variables = {"params": unflatten_dict(flat, sep="/")}
    save_model(folder, LoadedModel("run", config, variables, ByteTokenizer(), None, Conversation()))
    return folder
