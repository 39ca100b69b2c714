"""A small packed model with layers of every kind, and helpers to modify its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_jax.data.tokenizers import CharTokenizer
from bitnet_jax.models import ModelConfig
from tests.robustness.fuzz_packed_folders import take_apart

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=24, num_layers=1, num_heads=2, ffn_size=40, max_length=32,
    embedding_dtype="bfloat16",
    precision=(
        ("*/q_proj", "paretoq_1.58"), ("*/k_proj", "bit"), ("*/gate_proj", "uint4_group32(granularity=tensor)"),
        ("*/mlp/*", "bitnet"), ("*/o_proj", "float32"), ("*", "bitnet_b158"),
    ),
)  # fmt: skip
TOKENIZER = CharTokenizer("abcdefé\n", separator="\n")
FILES = {"model.safetensors", "config.json", "tokenizer.json"}


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def header_of(folder: Path) -> tuple[dict[str, Any], int]:
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), end


def replace_header(folder: Path, header: dict[str, Any] | str) -> None:
    path = folder / "model.safetensors"
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[header_of(folder)[1] :])


def sign(folder: Path) -> None:
    """Recomputes all checksums, as a malicious author would."""
    take_apart(folder).write(folder)
