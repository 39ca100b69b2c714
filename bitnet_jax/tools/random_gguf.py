"""A GGUF file with random weights in the shape of a packed model, to time llama.cpp with.

llama.cpp has no architecture for every model of this package, so the file has that of the nearest one with matrices of
the same shapes: `bitnet` for models with sub norms, `llama` for others, both with a gated SiLU. Only the elementwise
operations between the matrices may differ.
"""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np

from bitnet_jax.interop import gguf_writer
from bitnet_jax.interop.gguf import TABLES, tensor_names
from bitnet_jax.interop.gguf_config import family_of, metadata_of
from bitnet_jax.interop.gguf_file import Value
from bitnet_jax.interop.gguf_types import TensorType, named_type
from bitnet_jax.interop.gguf_writer import NewTensor
from bitnet_jax.models import ModelConfig

# Format of packed codes -> the type of llama.cpp with the same values. Ternary: llama.cpp has kernels for TQ2_0 alone.
TYPE_OF = {
    "ternary2": "TQ2_0", "ternary5": "TQ2_0", "binary": "Q1_0", "int4": "Q4_0", "uint4": "Q4_1", "int8": "Q8_0",
    "bfloat16": "BF16", "float32": "F32",
}  # fmt: skip
# float16 numbers in a block, by their first byte: the scale and, of Q4_1, the minimum.
_SCALES = {
    "TQ2_0": {64: 0.02}, "Q1_0": {0: 0.02}, "Q4_0": {0: 0.02}, "Q4_1": {0: 0.02, 2: -0.15}, "Q8_0": {0: 0.02},
}  # fmt: skip
_POOL = 4099  # blocks, drawn once and repeated; a prime, so that the rows of a matrix differ


def nearest_config(config: ModelConfig) -> ModelConfig:
    """The model of llama.cpp with matrices of the same shapes."""
    sub = config.norm_placement == "sub"
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        ffn_size=config.ffn_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_length=config.max_length,
        rope_theta=config.rope_theta,
        mlp="silu_glu",
        norm_placement="sub" if sub else "pre",
        tie_embeddings=sub or config.tie_embeddings,
    )


def write_random_gguf(path: str | Path, config: ModelConfig, *, matrices: str, head: str) -> None:
    """Writes random weights without a tokenizer.

    Args:
      matrices: type of the matrices in the layers, a value of TYPE_OF.
      head: type of the embedding and of the output head.

    Raises:
      ValueError: a shape that the type cannot hold, or an architecture that llama.cpp does not have.
      StorageError: see `gguf_writer.write`.
    """
    if not config.mlp.endswith("_glu"):
        raise ValueError(
            f"got mlp={config.mlp!r}, expected a gated one: llama.cpp's models have three matrices there"
        )
    shape = nearest_config(config)
    name = family_of(shape)
    metadata = {
        "general.architecture": Value("string", name),
        "general.name": Value("string", "random weights"),
    }
    metadata |= metadata_of(shape, name)
    metadata["tokenizer.ggml.model"] = Value("string", "none")
    tensors = []
    for leaf, (tensor, dims) in tensor_names(shape).items():
        kind = named_type("F32" if len(dims) == 1 else head if leaf in TABLES else matrices)
        tensors.append(NewTensor(tensor, kind, dims, lambda kind=kind, dims=dims: _random(kind, dims)))  # type: ignore[misc]
    gguf_writer.write(path, metadata, tensors)


def _random(kind: TensorType, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [nbytes]; vectors, the gains of norms, are 1."""
    rng = np.random.default_rng(math.prod(shape))
    if len(shape) == 1:
        return np.ones(shape, np.float32).view(np.uint8)
    if kind.block == 1:
        dtype = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}[kind.name]
        pool = rng.normal(0, 0.02, _POOL).astype(dtype)
    else:
        blocks = rng.integers(0, 256, (_POOL, kind.bytes), dtype=np.uint8)
        if kind.name == "TQ2_0":  # 2-bit fields 0, 1 and 2
            fields = rng.integers(0, 3, (4, *blocks.shape), dtype=np.uint8)
            blocks = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
        for at, scale in _SCALES[kind.name].items():
            blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
        pool = blocks.reshape(-1)
    return np.resize(pool.view(np.uint8), kind.nbytes(shape))
