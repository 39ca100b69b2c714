"""The bytes that single tokens stand for: a token of a byte-level vocabulary may be part of a character."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer


def token_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """A function from a token id to its bytes. A special token, which `decode` drops, has the bytes of its name, and an
    id outside the vocabulary none."""
    if isinstance(tokenizer, ByteTokenizer):
        return lambda token: bytes([token]) if 0 <= token < 256 else b""
    if isinstance(tokenizer, CharTokenizer):
        symbols = tokenizer.symbols
        return lambda token: symbols[token].encode() if 0 <= token < len(symbols) else b""
    if not isinstance(tokenizer, JsonTokenizer):
        return lambda token: tokenizer.decode([token]).encode()
    fields = json.loads(tokenizer.to_json())
    decoders = _kinds(fields.get("decoder"))
    special = special_tokens(tokenizer)
    letters = _byte_of_letter() if "ByteLevel" in decoders else None

    def of(token: int) -> bytes:
        if token in special:
            return special[token].encode()
        name = tokenizer.token_text(token)
        if name is None:
            return b""
        if letters is not None and all(letter in letters for letter in name):
            return bytes(letters[letter] for letter in name)
        if "ByteFallback" in decoders and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        # The library may treat the first token of a text specially, such as drop its space.
        return tokenizer.decode([token, token]).encode()[len(tokenizer.decode([token]).encode()) :]

    return of


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens that `decode` drops, with their names."""
    if not isinstance(tokenizer, JsonTokenizer):
        return {}
    added = json.loads(tokenizer.to_json()).get("added_tokens") or []
    return {entry["id"]: entry["content"] for entry in added if entry["special"]}


def _kinds(decoder: Any) -> set[str]:
    """The types of a decoder of tokenizer.json and of those inside it."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*map(_kinds, decoder.get("decoders") or []))


def _byte_of_letter() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 characters stand for themselves, the others follow from
    U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
