"""Named model sizes.

The sizes 125m ... 100b are the dummy models of bitnet.cpp (2410.16144); `2b4t` is BitNet b1.58 2B-4T
(2504.12285 and its released checkpoint); `tiny` is for tests and demos.
"""

from __future__ import annotations

from bitnet_jax.models.transformer import ModelConfig

_DUMMY_SIZES = {  # hidden, ffn, layers, heads
    "125m": (768, 3072, 11, 12),
    "350m": (1024, 3072, 24, 16),
    "700m": (1536, 4096, 24, 16),
    "1b": (2048, 3584, 24, 32),
    "1.5b": (1536, 9216, 28, 32),
    "2.5b": (2560, 6912, 30, 20),
    "3.8b": (3840, 8192, 24, 32),
    "7b": (4096, 12032, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "30b": (6656, 16384, 60, 52),
    "70b": (8192, 24576, 80, 64),
    "100b": (8192, 45568, 72, 64),
}


def _dummy(hidden: int, ffn: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        max_length=4096,
        mlp="silu_glu",
        norm_placement="pre",
        tie_embeddings=False,
        embedding_dtype="bfloat16",
    )


PRESETS: dict[str, ModelConfig] = {name: _dummy(*size) for name, size in _DUMMY_SIZES.items()} | {
    "tiny": ModelConfig(
        vocab_size=256,
        hidden_size=64,
        ffn_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_length=256,
    ),
    "2b4t": ModelConfig(
        vocab_size=128_256,
        hidden_size=2560,
        ffn_size=6912,
        num_layers=30,
        num_heads=20,
        num_kv_heads=5,
        max_length=4096,
        rope_theta=500_000.0,
        embedding_dtype="bfloat16",
    ),
}
