"""Answers of a given form: a grammar says which tokens may come next, by llguidance (an optional package).

    grammar = Grammars(tokenizer, end).compile(json_answer(schema))   # raises DataError; shared by all choices
    progress = grammar.start()                                        # of one answer
    progress.mask(vocab_size)                                         # float32 [V], 0 or -inf, added to the logits
    progress.advance(token)                                           # True: the answer is complete

JSON is written as Python's `json.dumps` does: one space behind each comma and colon, and nothing else around values.
Schemas come from strangers, so their size, their depth and the work of each step are limited.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.token_bytes import special_tokens, token_bytes
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.optional_packages import missing_package

MAX_SCHEMA, MAX_DEPTH = 1 << 16, 64  # characters of JSON, nested values
# llguidance reads options from this field of a schema; a client's own are replaced.
OPTIONS = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


class GrammarError(RuntimeError):
    """The answer cannot continue: a step took too much work, or the vocabulary lacks what must follow."""


def json_value(schema: dict[str, Any]) -> str:
    """The part of a grammar that is a JSON value of a schema. Raises DataError: it is too long or too deep."""
    if _depth(schema) > MAX_DEPTH:
        raise DataError(f"got more than {MAX_DEPTH} nested values, expected fewer; flatten the schema")
    text = json.dumps(schema | OPTIONS)
    if len(text) > MAX_SCHEMA:
        raise DataError(f"got {len(text)} characters, expected at most {MAX_SCHEMA}; shorten the schema")
    return f"%json {text}"


def json_answer(schema: dict[str, Any]) -> str:
    """The grammar of an answer that is one JSON value. Raises DataError: see `json_value`."""
    return f"start: value\nvalue: {json_value(schema)}\n"


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


class Grammars:
    """Compiles grammars over the bytes of a tokenizer's tokens; making one reads the whole vocabulary.

    Args:
      end: tokens that end an answer.

    Raises:
      DataError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, end: tuple[int, ...]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise DataError(missing_package("llguidance")) from error
        self._vocab_size = tokenizer.vocab_size
        self._library: Any = llguidance
        # A model without an end has one that it cannot choose, behind its vocabulary.
        ends = [*end] or [tokenizer.vocab_size]
        wrapper = self._library.TokenizerWrapper(_Vocabulary(tokenizer, ends))
        self._tokenizer = self._library.LLTokenizer(wrapper, eos_token=ends)

    def compile(self, lark: str) -> Grammar:
        """Args: a grammar in llguidance's variant of Lark. Raises DataError: llguidance refuses it, or no answer can
        begin."""
        limits = self._library.LLParserLimits(verbose_errors=False)
        matcher = self._library.LLMatcher
        matcher = matcher(self._tokenizer, matcher.grammar_from_lark(lark), log_level=0, limits=limits)
        if matcher.is_error():
            raise DataError(_one_line(matcher.get_error()))
        grammar = Grammar(matcher)
        try:
            grammar.start().mask(self._vocab_size)
        except GrammarError as error:
            raise DataError(str(error)) from error
        return grammar


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, ends: list[int]) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, ends[0]
        size, bytes_of = tokenizer.vocab_size, token_bytes(tokenizer)
        self.tokens = [bytes_of(token) for token in range(max(size, 1 + max(ends)))]
        self.tokens[ends[0]] = self.tokens[ends[0]] or b"</s>"
        self.special_token_ids = sorted({*special_tokens(tokenizer), *ends})

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).tolist()
        return ids


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> Progress:
        return Progress(self._matcher.deep_copy())


class Progress:
    """How far an answer has come in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def advance(self, token: int) -> bool:
        """Takes the next token; whether only the end may follow. Raises GrammarError: it may not come next."""
        self._matcher.consume_token(token)
        self._check()
        complete: bool = self._matcher.is_stopped()
        return complete

    def mask(self, vocab_size: int) -> np.ndarray:
        """float32 [V]: 0 for tokens that may come next, -inf for others. Raises GrammarError: there are none."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(vocab_size, bool)
        known = np.unpackbits(bits, bitorder="little")[:vocab_size]
        allowed[: len(known)] = known
        if not allowed.any():
            raise GrammarError("the vocabulary has no token that may follow")
        return np.where(allowed, np.float32(0), np.float32(-np.inf))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_one_line(self._matcher.get_error()))


def _one_line(message: str) -> str:
    """A message without the source of the grammar that it quotes, which is not the client's."""
    message = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?|<non-verbose/>", "", message)
    return " ".join(re.split(r"\n\s*\d+ \| ", message)[0].split())[:300] or "no message"
