"""Operations of an update, counted from the shapes of a model."""

from __future__ import annotations

import pytest

from bitnet_jax.models import ModelConfig
from bitnet_jax.training.flops import training_flops_per_token

T = 8
SHAPE = dict(vocab_size=32, hidden_size=16, num_layers=3, num_heads=4, ffn_size=24, max_length=T)


def config(**fields: object) -> ModelConfig:
    return ModelConfig.from_dict(SHAPE | dict(mlp="silu_glu") | fields)


def test_a_token_counts_its_products_and_the_keys_it_sees_three_times() -> None:
    """Forward, and the gradients to both factors."""
    blocks = 3 * (4 * 16 * 16 + 3 * 16 * 24)
    keys = sum(range(1, T + 1)) / T
    expected = 3 * 2 * (blocks + 32 * 16 + 3 * 2 * 16 * keys)
    assert training_flops_per_token(config(), T) == pytest.approx(expected)
    assert training_flops_per_token(config(tie_embeddings=False), T) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        (dict(sliding_window=3), (1 + 2 + 6 * 3) / T),
        (dict(sliding_window=100), 36 / T),
        (dict(attention="linear"), 4),
        (dict(causal=False, num_classes=2), T),
    ],
)
def test_attention_counts_the_keys_that_a_query_sees(fields: dict[str, object], keys: float) -> None:
    shapes = {path: n * k for path, (n, k) in config(**fields).linear_shapes().items()}
    head = shapes.pop("classifier") / T if "classifier" in shapes else 32 * 16
    expected = 6 * (sum(shapes.values()) + head) + 12 * 3 * 16 * keys
    assert training_flops_per_token(config(**fields), T) == pytest.approx(expected)
