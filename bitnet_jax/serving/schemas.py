"""Bodies of the OpenAI API to requests of the engine."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_jax.data.chat_template import chat_ids
from bitnet_jax.data.conversation import Conversation, prompt_ids
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.token_bytes import special_tokens, token_bytes
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.inference.sampling import MIN_TEMPERATURE, SamplingConfig
from bitnet_jax.serving.fields import ApiError, Fields
from bitnet_jax.serving.grammar import Grammar, Grammars
from bitnet_jax.serving.messages import mentions_calls, messages
from bitnet_jax.serving.passes import TOP
from bitnet_jax.serving.requests import Request
from bitnet_jax.serving.response_format import response_format
from bitnet_jax.serving.tools import OPEN, Tools, tools

MAX_ANSWERS = 128  # prompts times n
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_BIASES = 1024
# Fields of OpenAI's that ask for what this server cannot do, and the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
NEUTRAL_OF_TEXT: dict[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",)}


class Served:
    """The model as requests name and see it."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        conversation: Conversation,
        context: int,
        adapters: Sequence[str] = (),
    ) -> None:
        self.name, self.tokenizer, self.conversation, self.context = name, tokenizer, conversation, context
        self.names = (name, *adapters)  # an adapter is a model to its clients
        self.bytes_of = token_bytes(tokenizer)
        self.special = special_tokens(tokenizer)
        self.vocab_size = tokenizer.vocab_size

    @functools.cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.conversation.end)

    def grammar(self, lark: str, param: str) -> Grammar:
        """Raises ApiError, named by the field that asks for it."""
        try:
            return self._grammars.compile(lark)
        except DataError as error:
            raise ApiError(f"{param}: {error}", param=param) from error

    def adapter(self, fields: Fields) -> str | None:
        """The adapter that the field `model` names; None: the model itself. Raises ApiError: neither."""
        name = fields.text("model")
        expected = " or ".join(map(repr, self.names))
        if name is None:
            raise ApiError(f"model: missing, expected {expected}", param="model")
        if name not in self.names:
            only = ", the only one that is loaded" if len(self.names) == 1 else ""
            message = f"model: got {name[:60]!r}, expected {expected}{only}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        return None if name == self.name else name


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a body asks for: one request for every choice."""

    chat: bool
    requests: tuple[Request, ...]
    stream: bool
    include_usage: bool  # in a stream
    top: int | None  # most likely tokens beside the log-probability of each; None: no log-probabilities
    echo: tuple[str, ...] | None  # the text of each choice's prompt, or None
    tools: Tools | None = None  # whose calls are recognised in the answers

    def model(self, served: Served) -> str:
        """The name of the model, or of the adapter, that answers."""
        return self.requests[0].adapter or served.name


def chat_completion(fields: Fields, served: Served, client: str) -> Asked:
    """Raises ApiError, or DataError of the chat template."""
    adapter = served.adapter(fields)
    history, functions, lark = messages(fields), tools(fields), response_format(fields)
    return chat(fields, served, client, adapter, history, functions, lark)


def chat(
    fields: Fields,
    served: Served,
    client: str,
    adapter: str | None,
    history: list[dict[str, Any]],
    functions: Tools | None,
    lark: str | None,
    format_name: str = "response_format",
) -> Asked:
    """An answer to messages.

    Args:
      fields: the other fields of a chat.
      lark: the grammar of an answer that is JSON, which the field `format_name` asks for.

    Raises:
      ApiError, or DataError of the chat template.
    """
    if functions is not None or any(map(mentions_calls, history)):
        _check_tools(served, functions, lark, format_name)
    definitions = None if functions is None else functions.definitions
    prompt = chat_ids(served.tokenizer, served.conversation, history, definitions)
    if fields.boolean("logprobs"):
        top: int | None = fields.integer("top_logprobs", 0, TOP, 0)
    else:
        top = None
        fields.only("top_logprobs", (0,))
    limits = [fields.integer(name, 1, 2**31 - 1) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if limit is not None]
    most = min(given) if given else max(1, served.context - len(prompt))
    for name, neutral in NEUTRAL.items():
        fields.only(name, neutral)
    grammar = None
    if lark is not None:
        grammar = served.grammar(lark, format_name)
    elif functions is not None and functions.lark is not None:
        grammar = served.grammar(functions.lark, "tools")
    asked = _asked(fields, served, client, adapter, [prompt], most, chat=True, top=top, grammar=grammar)
    return dataclasses.replace(asked, tools=functions)


def _check_tools(served: Served, functions: Tools | None, lark: str | None, format_name: str) -> None:
    """Raises ApiError: the model cannot be told of tools, or its calls not be recognised."""
    template = served.conversation.template
    if template is not None and "tools" not in template:
        raise ApiError(
            "tools: the chat template of this model does not mention tools, expected one that does; "
            "leave them out, or serve another model",
            param="tools",
        )
    if OPEN in served.special.values():
        raise ApiError(f"tools: {OPEN} is a special token of this model, expected one of text", param="tools")
    if functions is not None and lark is not None:
        raise ApiError(
            f"{format_name}: got JSON together with tools, expected one of them; leave one out, "
            'or set tool_choice to "none"',
            param=format_name,
        )


def completion(fields: Fields, served: Served, client: str) -> Asked:
    """Raises ApiError."""
    adapter = served.adapter(fields)
    texts, prompts = _prompts(fields, served)
    top = fields.integer("logprobs", 0, TOP)
    echo = fields.boolean("echo")
    most = fields.integer("max_tokens", 0 if echo else 1, 2**31 - 1, 16)
    assert most is not None
    for name, neutral in NEUTRAL_OF_TEXT.items():
        fields.only(name, neutral)
    return _asked(
        fields, served, client, adapter, prompts, most, chat=False, top=top, echo=texts if echo else None
    )


def _asked(
    fields: Fields,
    served: Served,
    client: str,
    adapter: str | None,
    prompts: list[np.ndarray],
    max_tokens: int,
    *,
    chat: bool,
    top: int | None,
    echo: list[str] | None = None,
    grammar: Grammar | None = None,
) -> Asked:
    """The fields that both kinds of completion have."""
    temperature = fields.number("temperature", 0, 2, 1.0)
    top_p = fields.number("top_p", 0, 1, 1.0)
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    seed = secrets.randbits(63) if seed is None else seed % 2**64
    n = fields.integer("n", 1, MAX_ANSWERS, 1)
    assert n is not None
    if len(prompts) * n > MAX_ANSWERS:
        raise ApiError(
            f"got {len(prompts)} prompts with n={n}, expected at most {MAX_ANSWERS} answers", param="n"
        )
    stream = fields.boolean("stream")
    options = fields.take("stream_options", {})
    if not isinstance(options, dict) or (options and not stream):
        raise fields.wrong("stream_options", options, "an object, in a stream")
    options = Fields(options, "stream_options.")
    include_usage = options.boolean("include_usage")
    options.done()
    first = Request(
        prompt=prompts[0],
        max_tokens=max_tokens,
        sampling=_sampling(temperature, top_p),
        end=served.conversation.end,
        stop=_stop(fields),
        bias=_bias(fields, served),
        presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
        grammar=grammar,
        scores=top is not None,
        score_prompt=top is not None and echo is not None,
        adapter=adapter,
        client=fields.text("user") or client,
    )
    fields.done()
    # A choice has the seed of the first one plus its number, and so is the answer to n=1 with that seed.
    requests = tuple(
        dataclasses.replace(first, prompt=prompt, seed=(seed + i) % 2**64)
        for prompt in prompts
        for i in range(n)
    )
    texts = None if echo is None else tuple(text for text in echo for _ in range(n))
    return Asked(chat, requests, stream, include_usage, top, texts)


def _sampling(temperature: float, top_p: float) -> SamplingConfig:
    if temperature < MIN_TEMPERATURE or top_p == 0:
        return SamplingConfig()  # of the most likely tokens with a probability of 0 there is the first
    return SamplingConfig(temperature=temperature, top_p=top_p)


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    words = [stop] if isinstance(stop, str) else stop
    expected = f"up to {MAX_STOPS} non-empty strings of at most {MAX_STOP_LENGTH} characters"
    if not isinstance(words, list) or len(words) > MAX_STOPS:
        raise fields.wrong("stop", stop, expected)
    if not all(isinstance(word, str) and 0 < len(word) <= MAX_STOP_LENGTH for word in words):
        raise fields.wrong("stop", stop, expected)
    return tuple(words)


def _bias(fields: Fields, served: Served) -> tuple[tuple[int, float], ...]:
    bias = fields.take("logit_bias", {})
    expected = f"an object of at most {MAX_BIASES} token ids with numbers from -100 to 100"
    if not isinstance(bias, dict) or len(bias) > MAX_BIASES:
        raise fields.wrong("logit_bias", bias, expected)
    for token, addition in bias.items():
        number = isinstance(addition, int | float) and not isinstance(addition, bool)
        if not (
            token.isascii() and token.isdigit() and len(token) < 10 and number and -100 <= addition <= 100
        ):
            raise fields.wrong("logit_bias", {token: addition}, expected)
    return tuple((int(token), float(addition)) for token, addition in bias.items())


def _prompts(fields: Fields, served: Served) -> tuple[list[str], list[np.ndarray]]:
    """The prompts of a completion, as texts and as tokens: a text, tokens, or a list of either."""
    prompt = fields.take("prompt")
    expected = "a text, token ids, or a list of either"
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise fields.wrong("prompt", prompt, expected)
    if len(prompt) > MAX_ANSWERS:
        raise ApiError(f"prompt: got {len(prompt)}, expected at most {MAX_ANSWERS}", param="prompt")
    texts, ids = [], []
    for one in prompt:
        if isinstance(one, str):
            texts.append(one)
            ids.append(prompt_ids(served.tokenizer, served.conversation, one))
        else:
            ids.append(token_ids(fields, "prompt", one, served))
            texts.append(b"".join(map(served.bytes_of, ids[-1].tolist())).decode(errors="replace"))
    return texts, ids


def token_ids(fields: Fields, name: str, value: Any, served: Served) -> np.ndarray:
    """int32 [T]. Raises ApiError: not a list of token ids."""
    if not isinstance(value, list) or not all(
        type(token) is int and 0 <= token < served.vocab_size for token in value
    ):
        raise fields.wrong(name, value, f"token ids from 0 to {served.vocab_size - 1}")
    return np.array(value, np.int32)
