"""Translates requests of lm-evaluation-harness into those of bitnet_jax.evaluation.

Edge cases are those of the harness's model for Hugging Face checkpoints (lm_eval 0.4.13: `TemplateLM._encode_pair`,
`HFLM.tok_encode`, `HFLM.loglikelihood_rolling`, `normalize_gen_kwargs`), so that scores are comparable. This module
does not import the harness.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitnet_jax.data import chat_template
from bitnet_jax.data.conversation import with_begin
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import JsonTokenizer
from bitnet_jax.evaluation.likelihood import Request, TextModel
from bitnet_jax.inference.sampling import SamplingConfig

NEW_TOKENS = 256  # default length of an answer, at most half of the model's positions
LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the first one given counts
FILTERS: dict[str, float] = {
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}  # name -> value that is off
# Settings of other programs -> the values with which they change nothing; None (not stated) changes nothing either.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (1,),
    "diversity_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "use_cache": (True,),
    "early_stopping": (False,),
    "stop": ((),),
}


class HarnessError(ValueError):
    """The harness is not installed, or a request or setting that is not supported."""


def prefix_id(model: TextModel, chosen: int | None = None) -> int:
    """The token that a text without context is predicted from.

    The chosen one, or the first that the model states of: bos, its begin tokens, eos, its end tokens.

    Raises:
      HarnessError: the model states none of them.
    """
    if chosen is not None:
        return chosen
    for name, ids in (("bos_token", model.begin), ("eos_token", model.end)):
        text = dict(model.stated.special_tokens).get(name)
        if text is not None and isinstance(model.tokenizer, JsonTokenizer):
            ids = tuple(i for i in (model.tokenizer.token_id(text),) if i is not None) or ids
        if ids:
            return ids[0]
    raise HarnessError(
        "got a model that states neither begin nor end tokens, expected one of them before a text without context; "
        "pass prefix_token_id=ID"
    )


def text_ids(model: TextModel, text: str) -> np.ndarray:
    """int32 [T]: the tokens of a text after the begin tokens, unless the text spells them, as a chat template may."""
    ids = model.tokenizer.encode(text)
    begin = np.array(model.begin, np.int32)
    return ids if np.array_equal(ids[: len(begin)], begin) else with_begin(model.begin, ids)


def pair_request(model: TextModel, context: str, continuation: str, prefix: int | None = None) -> Request:
    """The request for ln P(continuation | context).

    An empty context is the prefix: the given token, or `prefix_id`. Trailing whitespace of the context belongs to the
    continuation. The context is encoded alone; the continuation is what both, encoded as one text, have after that
    number of tokens.

    Raises:
      HarnessError: the continuation has no token, or there is no prefix.
    """
    stripped = context.rstrip()
    if context:
        tokens = text_ids(model, context + continuation)
        alone = text_ids(model, stripped) if stripped else np.array(model.begin, np.int32)
        boundary = len(alone)
        tokens = np.concatenate([alone, tokens[boundary:]])
        if boundary == 0:  # nothing but whitespace, and no begin tokens
            tokens, boundary = with_begin((prefix_id(model, prefix),), tokens), 1
    else:
        tokens, boundary, first = model.tokenizer.encode(continuation), 1, prefix_id(model, prefix)
        if not len(tokens) or tokens[0] != first:
            tokens = with_begin((first,), tokens)
    if boundary >= len(tokens):
        raise HarnessError(
            f"got the continuation {continuation[:60]!r} of {context[-60:]!r}, expected it to add a token"
        )
    return Request(tokens, boundary)


def rolling_request(model: TextModel, text: str, prefix: int | None = None) -> Request | None:
    """The request for ln P(text), all of whose tokens are scored after the prefix; None: it has no tokens.

    Begin tokens that the tokenizer writes before every text are scored too, as the harness does.
    """
    ids = text_ids(model, text) if model.stated.begins_prompts else model.tokenizer.encode(text)
    return Request(with_begin((prefix_id(model, prefix),), ids), 1) if len(ids) else None


def prompt_of(model: TextModel, context: str, prefix: int | None = None) -> np.ndarray:
    """int32 [T]: the tokens of a context to continue; of an empty one the prefix."""
    ids = text_ids(model, context)
    return ids if len(ids) else np.array([prefix_id(model, prefix)], np.int32)


class Generation(NamedTuple):
    new_tokens: int
    stop: tuple[str, ...]
    sampling: SamplingConfig


def generation(settings: Mapping[str, Any], max_length: int) -> Generation:
    """The generation settings of a task, for a model of `max_length` positions.

    `do_sample` decides between sampling and greedy; without it a positive temperature does. A value of null is one that
    is not stated.

    Raises:
      HarnessError: a setting that is unknown or out of range, or no room for a prompt; the message names it.
    """
    if not isinstance(settings, Mapping):
        raise HarnessError(f"got generation settings {str(settings)[:60]!r}, expected an object")
    stated = {name: value for name, value in settings.items() if value is not None}
    known = {"until", "do_sample", "temperature", "top_k", *FILTERS, *LENGTHS}
    for name, value in stated.items():
        if name not in known and not _is_neutral(name, value):
            raise HarnessError(
                f"generation_kwargs: {name}: got {str(value)[:60]}, which is not supported; remove it (supported: "
                f"{', '.join(sorted(known))})"
            )
    return Generation(_new_tokens(stated, max_length), _stop(stated.get("until")), _sampling(stated))


def _is_neutral(name: str, value: Any) -> bool:
    value = tuple(value) if isinstance(value, list) else value
    return name in NEUTRAL and value in NEUTRAL[name]


def _new_tokens(stated: Mapping[str, Any], max_length: int) -> int:
    given = {name: stated[name] for name in LENGTHS if name in stated}
    if not given:
        return max(1, min(NEW_TOKENS, max_length // 2))
    name, value = next(iter(given.items()))
    if len(given) > 1:
        warnings.warn(f"generation_kwargs: got {', '.join(given)}, of which {name} is used", stacklevel=2)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise HarnessError(f"generation_kwargs: {name}: got {value!r}, expected an integer")
    if not 1 <= value < max_length:
        raise HarnessError(
            f"generation_kwargs: {name}: got {value}, expected 1 to {max_length - 1}: the model has {max_length} "
            "positions, for the prompt and its answer"
        )
    return int(value)


def _stop(until: Any) -> tuple[str, ...]:
    words = [until] if isinstance(until, str) else [] if until is None else until
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise HarnessError(
            f"generation_kwargs: until: got {str(until)[:60]}, expected text or a list of texts"
        )
    return tuple(dict.fromkeys(word for word in words if word))


def _sampling(stated: Mapping[str, Any]) -> SamplingConfig:
    sample, temperature = stated.get("do_sample"), stated.get("temperature", 0.0)
    if not isinstance(sample, bool | None):
        raise HarnessError(f"generation_kwargs: do_sample: got {sample!r}, expected true or false")
    try:
        filters = {name: stated.get(name, off) for name, off in FILTERS.items()}
        top_k = stated.get("top_k") or None  # 0: all tokens, as in transformers
        checked = SamplingConfig(temperature=temperature, top_k=top_k, **filters)
    except ValueError as error:
        raise HarnessError(f"generation_kwargs: {error}") from error
    if sample and checked.temperature == 0:
        raise HarnessError(
            f"generation_kwargs: do_sample is true with temperature {temperature}, expected a positive temperature"
        )
    if sample is False or checked.temperature == 0:
        if sample is False and checked.temperature:
            warnings.warn(
                f"generation_kwargs: do_sample is false, so temperature {temperature} has no effect",
                stacklevel=2,
            )
        return SamplingConfig(repetition_penalty=checked.repetition_penalty)
    return checked


def chat_prompt(
    model: TextModel, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
) -> str:
    """The text of messages by the model's chat template; without the prompt for an answer it ends inside the last one.

    A template that fails is tried again without system messages, with a warning, as the harness does.

    Raises:
      HarnessError: the model has no template, or it fails without system messages too.
    """
    conversation = model.stated
    try:
        try:
            text = chat_template.render(conversation, messages, add_generation_prompt=add_generation_prompt)
        except DataError as error:
            others = [message for message in messages if message.get("role") != "system"]
            if conversation.template is None or len(others) == len(messages):
                raise
            warnings.warn(f"{error}; the system messages are left out", stacklevel=2)
            messages = others
            text = chat_template.render(conversation, messages, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise HarnessError(str(error)) from error
    if add_generation_prompt:
        return text
    last = str(messages[-1]["content"]) if messages else ""
    for content in (last, last.strip()):
        if content and content in text:
            return text[: text.rindex(content) + len(content)]
    raise HarnessError(
        "got a chat template that does not write the last message, expected one that can be continued"
    )
