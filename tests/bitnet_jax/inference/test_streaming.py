"""Streamed text: stop strings and characters across piece boundaries, and the same ids as generate."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from bitnet_jax.inference import streaming
from bitnet_jax.inference.generation import generate
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.inference.streaming import cut_at_stop, stream
from bitnet_jax.models import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, ffn_size=32, max_length=40, mlp="relu2",
    tie_embeddings=False, precision="float32",
)  # fmt: skip
SAMPLED: dict[str, Any] = {
    "max_new_tokens": 24, "sampling": SamplingConfig(temperature=1.0), "key": jax.random.key(5), "chunk": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@example("\naa", [2], ["a", "\naa"])  # "a" is completed first, "\naa" begins first
@given(
    st.text("ab\n", max_size=30),
    st.lists(st.integers(0, 30), max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_text_is_cut_at_the_first_stop_string_for_any_pieces(
    text: str, places: list[int], stop: list[str]
) -> None:
    first = min((text.index(s) for s in stop if s in text), default=len(text))
    pieces = list(cut_at_stop(iter(cut(text, places)), stop))
    assert "".join(pieces) == text[:first]
    assert all(pieces)


def test_text_that_cannot_begin_a_stop_string_is_emitted_immediately() -> None:
    given: list[str] = []
    pieces = cut_at_stop(iter(["one ", "two <", "end", "ing> ", "<end>", "never"]), ["<end>"])
    for piece in pieces:
        given.append(piece)
    assert given == ["one ", "two ", "<ending> "]
    assert list(cut_at_stop(iter(["held <en"]), ["<end>"])) == ["held ", "<en"]


def test_a_stream_equals_the_decoded_text_of_generate(variables: dict[str, Any]) -> None:
    tokenizer = ByteTokenizer()
    prompt = tokenizer.encode("Grüße")[None]
    arguments = {name: value for name, value in SAMPLED.items() if name != "chunk"}
    tokens, (length,), _ = generate(CONFIG, variables, prompt, eos_ids=[0], **arguments)
    expected = tokenizer.decode(np.asarray(tokens[0, :length])).removesuffix("\0")
    assert len(expected) > 5

    pieces = list(stream(CONFIG, variables, tokenizer, "Grüße", **SAMPLED))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    # The same text up to a stop string of two of its characters, which may span chunks.
    stop = expected[4:6]
    stopped = "".join(stream(CONFIG, variables, tokenizer, "Grüße", stop=["never there", stop], **SAMPLED))
    assert stopped == expected[: expected.index(stop)]


def test_a_stream_begins_and_ends_as_the_model_states(variables: dict[str, Any]) -> None:
    tokenizer, greedy = ByteTokenizer(), {"max_new_tokens": 12}
    prompt = np.array([7, 8, *b"xy"])
    ids = np.asarray(generate(CONFIG, variables, prompt[None], **greedy).tokens[0]).tolist()
    states = Conversation(begin=(7, 8))
    assert "".join(
        stream(CONFIG, variables, tokenizer, "xy", conversation=states, **greedy)
    ) == tokenizer.decode(ids)
    for end in ((ids[2],), (ids[1],), (ids[2], ids[1])):
        states = Conversation(begin=(7, 8), end=end)
        text = "".join(stream(CONFIG, variables, tokenizer, "xy", conversation=states, **greedy))
        assert text == tokenizer.decode(ids[: min(map(ids.index, end))])
        assert text == "".join(stream(CONFIG, variables, tokenizer, prompt, conversation=states, **greedy))


def test_characters_of_several_tokens_are_emitted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve Grüße, 世界 🙂"
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    chunks = [ids[None, i : i + 3] for i in range(0, len(ids), 3)]
    chunks.append(np.asarray([[0]]))  # the end token, which is not text
    monkeypatch.setattr(streaming, "stream_tokens", lambda *a, **k: iter(chunks))
    counts: list[int] = []
    pieces = list(
        stream(CONFIG, {}, ByteTokenizer(), "x", max_new_tokens=9, on_tokens=counts.append, stop=["界 🙃"])
    )
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert counts == [chunk.shape[1] for chunk in chunks]


@pytest.mark.parametrize(
    ("tokenizer", "changes", "message"),
    [
        (ByteTokenizer(), {"prompt": ""}, "the prompt '' has no tokens"),
        (ByteTokenizer(), {"stop": [""]}, "stop: got"),
        (ByteTokenizer(), {"stop": "end"}, "stop: got 'end', expected a list"),
        (ByteTokenizer(), {"prompt": "x" * 30}, "prompt of 30 tokens and 24 new ones need 54"),
    ],
)
def test_errors_are_raised_by_the_call_itself(tokenizer: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(CONFIG, {}, tokenizer, **{"prompt": "x"} | SAMPLED | changes)


def test_a_tokenizer_larger_than_the_vocabulary_is_usable(variables: dict[str, Any]) -> None:
    larger = CharTokenizer("".join(map(chr, range(300))))
    with pytest.warns(UserWarning, match="the tokenizer has 300 tokens, the model 256"):
        pieces = list(stream(CONFIG, variables, larger, "xy", max_new_tokens=3))
    ids = generate(CONFIG, variables, larger.encode("xy")[None], max_new_tokens=3).tokens[0]
    assert "".join(pieces) == larger.decode(np.asarray(ids))
    with (
        pytest.warns(UserWarning, match="300 tokens"),
        pytest.raises(ValueError, match="prompt: got the token 'ī' with the id 299, expected ids below 256"),
    ):
        stream(CONFIG, variables, larger, "xī", max_new_tokens=3)


def test_exceeding_the_trained_length_warns_once(variables: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, trained_length=10)
    arguments: dict[str, Any] = {"max_new_tokens": 8}
    list(stream(config, variables, ByteTokenizer(), "xy", **arguments))
    for function in (
        lambda: list(stream(config, variables, ByteTokenizer(), "xyz", **arguments)),
        lambda: generate(config, variables, np.asarray([[1, 2, 3]]), **arguments),
    ):
        with pytest.warns(
            UserWarning, match="sequences of 11 tokens, the model was trained with 10"
        ) as caught:
            function()
        assert len(caught) == 1
