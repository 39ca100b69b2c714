"""Requests of lm-evaluation-harness mean what they mean to its own model for Hugging Face checkpoints."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.data import ByteTokenizer
from bitnet_jax.data.bpe import train_bpe
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.text import Document
from bitnet_jax.data.tokenizers import JsonTokenizer
from bitnet_jax.evaluation.harness_requests import (
    HarnessError,
    chat_prompt,
    generation,
    pair_request,
    prefix_id,
    prompt_of,
    rolling_request,
)
from bitnet_jax.evaluation.likelihood import TextModel, score_requests
from bitnet_jax.evaluation.lm_harness import with_begin_tokens
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig, Transformer
from tests.bitnet_jax.chat_folders import TEMPLATE, tokenizer_json

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, max_length=16, precision="float32"
)
BOS, EOS = 256, 258  # <s>, <|im_end|>
SPECIAL = (("bos_token", "<s>"), ("eos_token", "<|im_end|>"))
TEXT = "the model answers the question and the other question " * 40


def text_model(conversation: Conversation, tokenizer: Any = None) -> TextModel:
    return TextModel(CONFIG, {}, tokenizer or JsonTokenizer(tokenizer_json()), conversation)


PLAIN = Conversation(
    end=(EOS,), special_tokens=SPECIAL
)  # as SmolLM2: a bos token that is written before no text
BEGINS = Conversation(begin=(BOS,), end=(EOS,), special_tokens=SPECIAL)  # as Llama


def split(request: Any) -> tuple[list[int], list[int]]:
    return request.tokens[: request.scored_from].tolist(), request.tokens[request.scored_from :].tolist()


@pytest.mark.parametrize(
    ("conversation", "context", "continuation", "expected"),
    [
        (PLAIN, "", "ab", ([BOS], [97, 98])),
        (BEGINS, "", "ab", ([BOS], [97, 98])),
        (PLAIN, "", "<s>ab", ([BOS], [97, 98])),  # the prefix spelled out is not doubled
        (PLAIN, "q:", " a", ([113, 58], [32, 97])),
        (PLAIN, "q: ", "a", ([113, 58], [32, 97])),  # trailing whitespace belongs to the continuation
        (BEGINS, "q: \n", "a", ([BOS, 113, 58], [32, 10, 97])),
        (BEGINS, "<s>q", "a", ([BOS, 113], [97])),  # as a chat template writes it
        (PLAIN, "  ", "a", ([BOS], [32, 32, 97])),
        (BEGINS, "  ", "a", ([BOS], [32, 32, 97])),
        (Conversation(end=(EOS,)), "", "a", ([EOS], [97])),
    ],
)
def test_contexts_and_continuations(
    conversation: Conversation, context: str, continuation: str, expected: tuple[list[int], list[int]]
) -> None:
    assert split(pair_request(text_model(conversation), context, continuation)) == expected


def test_tokens_that_straddle_context_and_continuation() -> None:
    tokenizer = train_bpe([Document("text", TEXT)], 280)
    model = text_model(Conversation(end=(0,)), tokenizer)
    context, continuation = "the questio", "n"
    whole, part = tokenizer.encode(context + continuation), tokenizer.encode(context)
    assert len(whole) <= len(part)  # the merge moves the boundary: nothing is left to score
    with pytest.raises(HarnessError, match="expected it to add a token"):
        pair_request(model, context, continuation)
    both = tokenizer.encode(context + "n and")
    assert not np.array_equal(both[: len(part)], part)  # a token of both straddles the boundary
    request = pair_request(model, context, "n and")
    assert split(request) == (part.tolist(), both[len(part) :].tolist())


def test_the_prefix_is_stated_chosen_or_refused() -> None:
    assert prefix_id(text_model(PLAIN)) == BOS
    assert prefix_id(text_model(PLAIN), 7) == 7
    assert prefix_id(TextModel(CONFIG, {}, ByteTokenizer())) == 0  # the separator of a model trained here
    nothing = text_model(Conversation())
    assert split(pair_request(nothing, "q", "a")) == ([113], [97])  # not needed
    for ask in (lambda: pair_request(nothing, "", "a"), lambda: prompt_of(nothing, "")):
        with pytest.raises(HarnessError, match="pass prefix_token_id"):
            ask()
    assert split(pair_request(nothing, "", "a", 9)) == ([9], [97])
    assert prompt_of(text_model(PLAIN), "").tolist() == [BOS]
    assert prompt_of(text_model(BEGINS), "").tolist() == [BOS]
    assert prompt_of(text_model(BEGINS), "<s>a").tolist() == [BOS, 97]


def test_rolling_texts() -> None:
    def tokens(conversation: Conversation | None, text: str) -> Any:
        tokenizer = ByteTokenizer() if conversation is None else None
        made = rolling_request(
            TextModel(CONFIG, {}, tokenizer or JsonTokenizer(tokenizer_json()), conversation), text
        )
        return None if made is None else split(made)

    assert tokens(PLAIN, "ab") == ([BOS], [97, 98])
    assert tokens(BEGINS, "ab") == ([BOS], [BOS, 97, 98])  # the harness scores the token its tokenizer writes
    assert tokens(None, "ab") == ([0], [97, 98])
    assert tokens(PLAIN, "") is None


def test_add_bos_token() -> None:
    assert prompt_of(with_begin_tokens(text_model(PLAIN), True), "a").tolist() == [BOS, 97]
    assert prompt_of(with_begin_tokens(text_model(BEGINS), False), "a").tolist() == [97]


@pytest.fixture(scope="module")
def scored() -> TextModel:
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, params)
    return TextModel(CONFIG, {"params": params}, JsonTokenizer(tokenizer_json()), PLAIN)


def log_probabilities(model: TextModel, tokens: list[int]) -> np.ndarray:
    """ln P of each token but the first."""
    logits = Transformer(CONFIG).apply(model.variables, jnp.asarray(tokens[:-1], jnp.int32)[None]).logits[0]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens) - 1), tokens[1:]]


def test_contexts_beyond_the_window_lose_their_start(scored: TextModel) -> None:
    request = pair_request(scored, "x" * 30, " end")
    (score,) = score_requests(scored, [request])
    kept = request.tokens[-(CONFIG.max_length + 1) :].tolist()
    assert score.log_probability == pytest.approx(log_probabilities(scored, kept)[-4:].sum(), abs=1e-4)


@pytest.mark.parametrize("length", [3, 16, 17, 32, 39])
def test_rolling_windows_score_each_token_once_with_the_most_context(scored: TextModel, length: int) -> None:
    """The windows that the harness documents: the first ones adjacent, the last one with a full context."""
    text = ("abcdefghij" * 4)[:length]
    tokens, L = [BOS, *map(ord, text)], CONFIG.max_length
    total, done = 0.0, 0
    while done < length:
        new = min(L, length - done)
        end = done + new
        inputs = tokens[max(0, end - L) : end + 1]
        total += log_probabilities(scored, inputs)[-new:].sum()
        done = end
    made = rolling_request(scored, text)
    assert made is not None
    (score,) = score_requests(scored, [made])
    assert score.log_probability == pytest.approx(total, abs=1e-3)
    assert score.tokens == length


GREEDY = SamplingConfig()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (32, (), GREEDY)),  # half of the 64 positions
        ({"until": ["", "\n", "\n"], "max_gen_toks": 7}, (7, ("\n",), GREEDY)),
        ({"until": "stop", "max_new_tokens": 63}, (63, ("stop",), GREEDY)),
        ({"until": None, "temperature": None, "top_k": None}, (32, (), GREEDY)),
        ({"temperature": 0.0, "do_sample": False}, (32, (), GREEDY)),
        ({"temperature": 0.5}, (32, (), SamplingConfig(temperature=0.5))),
        ({"temperature": 0.5, "do_sample": True, "top_k": 0}, (32, (), SamplingConfig(temperature=0.5))),
        (
            {"do_sample": True, "temperature": 1, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
            (32, (), SamplingConfig(temperature=1, top_k=3, top_p=0.9, min_p=0.1)),
        ),
        (
            {"do_sample": False, "repetition_penalty": 1.5, "top_p": 0.5},
            (32, (), SamplingConfig(repetition_penalty=1.5)),
        ),
        ({"num_beams": 1, "use_cache": True, "length_penalty": 1.0, "stop": []}, (32, (), GREEDY)),
    ],
)
def test_generation_settings(settings: dict[str, Any], expected: Any) -> None:
    assert generation(settings, 64) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, "max_gen_toks: got 64, expected 1 to 63: the model has 64 positions"),
        ({"max_gen_toks": 0}, "max_gen_toks: got 0"),
        ({"max_gen_toks": "many"}, "max_gen_toks: got 'many'"),
        ({"do_sample": True}, "do_sample is true with temperature 0"),
        ({"do_sample": True, "temperature": None}, "do_sample is true with temperature 0"),
        ({"do_sample": "yes"}, "do_sample: got 'yes'"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"temperature": "hot"}, "temperature: got 'hot'"),
        ({"top_p": 2}, "top_p: got 2"),
        ({"top_k": -1, "temperature": 1.0}, "top_k: got -1"),
        ({"until": 5}, "until: got 5"),
        ({"until": [1]}, "until: got"),
        ({"num_beams": 4}, "num_beams: got 4, which is not supported"),
        ({"max_length": 40}, "max_length: got 40, which is not supported"),
        ({"stop": ["x"]}, "stop: got .*not supported"),
    ],
)
def test_unsupported_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        generation(settings, 64)


def test_settings_without_effect_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="temperature 0.5 has no effect"):
        assert generation({"do_sample": False, "temperature": 0.5}, 64).sampling == GREEDY
    with pytest.warns(UserWarning, match="got max_gen_toks, max_tokens, of which max_gen_toks is used"):
        assert generation({"max_tokens": 9, "max_gen_toks": 5}, 64).new_tokens == 5


def test_chat_prompts() -> None:
    pytest.importorskip("jinja2", reason="jinja2 is an extra")
    model = text_model(Conversation(end=(EOS,), template=TEMPLATE, special_tokens=SPECIAL))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, "}]
    asked = chat_prompt(model, messages[:1], add_generation_prompt=True)
    assert asked.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    continued = chat_prompt(model, messages, add_generation_prompt=False)
    assert continued.endswith(
        "<|im_start|>assistant\nHello,"
    )  # this template trims; nothing ends the message

    refuses = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    model = text_model(Conversation(template=refuses + "[{{ m.content }}]{% endfor %}"))
    system = [{"role": "system", "content": "Be brief."}, *messages[:1]]
    with pytest.warns(UserWarning, match="no system.*system messages are left out"):
        assert chat_prompt(model, system, add_generation_prompt=True) == "[Hi]"
    with pytest.raises(HarnessError, match="without a chat template"):
        chat_prompt(text_model(PLAIN), messages, add_generation_prompt=True)


def test_the_harness_splits_the_same_pairs_and_windows() -> None:
    """With lm-eval installed: its own `TemplateLM` with the encoding of its model for Hugging Face checkpoints."""
    api = pytest.importorskip("lm_eval.api.model", reason="no package lm-eval: pip install lm-eval")
    from lm_eval import utils
    from lm_eval.models.utils import normalize_gen_kwargs

    tokenizer = train_bpe([Document("text", TEXT)], 280)
    for conversation in (Conversation((0,), (0,)), Conversation(end=(0,))):
        model = text_model(conversation, tokenizer)

        class Theirs(api.TemplateLM):
            eot_token_id = 0
            begin = list(conversation.begin)

            def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
                ids = tokenizer.encode(string).tolist()
                return ids if add_special_tokens is False else self.begin + ids

            def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[Any]:
                return [(context, continuation) for _, context, continuation in requests]

            def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any: ...

            def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any: ...

        class Asked:
            def __init__(self, *args: str) -> None:
                self.args = args

        pairs = [
            ("", "the model"), ("the question:", " answers"), ("the question: ", "answers"),
            ("the questio", "n and the"), ("the  \n", "other"), ("é", " 🙂 the"), ("the model", "s answers the"),
        ]  # fmt: skip
        theirs = Theirs().loglikelihood([Asked(*pair) for pair in pairs], disable_tqdm=True)
        assert [split(pair_request(model, *pair)) for pair in pairs] == theirs
        assert [prefix_id(model)] == [Theirs().prefix_token_id]

        made = rolling_request(model, TEXT[:300])
        assert made is not None
        listed = list(utils.get_rolling_token_windows(Theirs().tok_encode(TEXT[:300]), 0, 16, 1))
        assert sum(len(predicted) for _, predicted in listed) == len(made.tokens) - 1
        assert [t for _, predicted in listed for t in predicted] == made.tokens[1:].tolist()
    for settings in ({"do_sample": False}, {"temperature": 0.5}, {"max_new_tokens": 5, "until": "x"}):
        read, normal = generation(settings, 1024), normalize_gen_kwargs(dict(settings), 256)
        assert (read.new_tokens, list(read.stop)) == (normal["max_gen_toks"], normal["until"])
        assert (read.sampling.temperature > 0) == normal["do_sample"]
