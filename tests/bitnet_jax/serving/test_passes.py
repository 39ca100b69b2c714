"""The passes of the engine: which models have exact rows, and that those rows are exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing
from bitnet_jax.serving.passes import rows_are_exact
from bitnet_jax.serving.pool import Pool, decoded_rows, width
from tests.bitnet_jax.serving.tiny_models import model

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, ffn_size=96, max_length=96,
    mlp="silu_glu", init_std=0.5, embedding_dtype="bfloat16",
)  # fmt: skip


def packed(**fields: Any) -> tuple[ModelConfig, dict[str, Any]]:
    config = dataclasses.replace(CONFIG, **fields)
    latent = jax.jit(Transformer(config).init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
    return config, packing.pack(latent["params"], config)


@pytest.mark.optimized
@pytest.mark.extended(after=1)
@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "bitnet_b158", "tie_embeddings": False},
        {"precision": "int8", "embedding_dtype": "int8"},
        {"precision": "uint4_a16", "head": "int8", "norm_placement": "sub"},
    ],
    ids=["ternary", "int8", "16-bit inputs"],
)
def test_bits_depend_neither_on_other_rows_nor_on_where_a_text_is_cut(fields: dict[str, Any]) -> None:
    config, variables = packed(**fields)
    assert rows_are_exact(config, variables)
    text = np.random.default_rng(0).integers(1, config.vocab_size, 40).astype(np.int32)
    alone, several = (Pool(config, {None: variables}, rows, 96, "bfloat16") for rows in (1, 5))

    def read(pool: Pool, row: int, cuts: list[int]) -> np.ndarray:
        for start, end in zip([0, *cuts], [*cuts, 40], strict=True):
            logits = pool.read_tokens(row, text[start:end], start, 32, False)
        return np.asarray(logits[0])

    first = read(alone, 0, [32])
    np.testing.assert_array_equal(first, read(several, 1, [5, 20, 25]))
    read(several, 2, [16, 32])
    (expected,) = np.asarray(alone.decode([0], text[:1], [40]))
    # Each decodes the same token at the same place, so the rows stay as they were.
    for rows, lengths in (
        ([1], [40]),
        ([2, 1], [40, 40]),
        ([4, 1, 2], [7, 40, 40]),
        ([0, 1, 2, 3, 4], [0, 40, 40, 0, 8]),
    ):
        among = np.asarray(several.decode(rows, [text[0]] * len(rows), lengths))
        for row in (1, 2):
            if row in rows:
                np.testing.assert_array_equal(among[rows.index(row)], expected)
    several.copy_row(1, 0)
    np.testing.assert_array_equal(np.asarray(several.decode([0], text[:1], [40]))[0], expected)


def test_rows_of_other_models_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    config, variables = model("bitnet_b158")
    assert rows_are_exact(config, variables)
    for changed in ({"norm": "layernorm"}, {"attention": "relu"}, {"dtype": "bfloat16"}):
        assert not rows_are_exact(dataclasses.replace(config, **changed), variables)  # type: ignore[arg-type]
    assert not rows_are_exact(*model("float32"))
    float_head = {**variables, "params": jax.tree.map(lambda x: x.astype(jnp.float32), variables["params"])}
    assert not rows_are_exact(config, float_head)
    monkeypatch.setattr("bitnet_kernels.cpu.unavailable", lambda: "no library")
    assert not rows_are_exact(config, variables)


def test_widths() -> None:
    assert [width(n, 128) for n in (1, 16, 17, 64, 65, 128)] == [16, 16, 32, 64, 128, 128]


def test_rows_of_a_decode_pass() -> None:
    assert [decoded_rows(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]
