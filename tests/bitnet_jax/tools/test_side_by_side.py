"""Models timed in turn: what is timed is the generation of the same tokens."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.inference.generation import generate
from bitnet_jax.model_folders import LoadedModel
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.tools import model_bench, side_by_side

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, max_length=64, precision="float32"
)


@pytest.fixture(scope="module")
def model() -> LoadedModel[Any]:
    variables = init_variables(CONFIG, jax.random.key(0))
    return LoadedModel("packed", CONFIG, variables, None, None, Conversation())


def test_both_parts_together_generate_the_new_tokens(
    model: LoadedModel[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, made = np.arange(1, 9, dtype=np.int32), []
    stream = model_bench.stream_tokens

    def watched(*args: Any, **kwargs: Any) -> Any:
        for tokens in stream(*args, **kwargs):
            made.append(tokens)
            yield tokens

    monkeypatch.setattr(model_bench, "stream_tokens", watched)
    took = side_by_side.in_turn({"a": side_by_side.ours(model, prompt, 6)}, rounds=2)
    assert set(took) == {("a", "prefill"), ("a", "decode")}
    expected = generate(CONFIG, model.variables, prompt[None], max_new_tokens=6).tokens
    assert [tokens.shape[1] for tokens in made] == [1, 5] * 3  # a round that is not counted, and two
    np.testing.assert_array_equal(np.concatenate(made[-2:], axis=1), expected)


def test_nats_are_those_of_the_logits(model: LoadedModel[Any]) -> None:
    ids = np.random.default_rng(0).integers(0, 40, 20)
    logits = CONFIG.module().apply(model.variables, ids[None, :-1]).logits[0]
    log_probs = jax.nn.log_softmax(logits)[np.arange(19), ids[1:]]
    nats = side_by_side.ours(model, ids[:8], 2).nats(ids)
    np.testing.assert_allclose(nats, -log_probs.mean(), rtol=1e-5)
