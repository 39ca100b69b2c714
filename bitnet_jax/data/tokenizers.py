"""Tokenizers: bytes, characters, or a `tokenizer.json` of the tokenizers library.

Three implementations of the protocol `Tokenizer`. `to_json` and `from_json` serialize a tokenizer as the
`tokenizer.json` of a run or packed model; for JsonTokenizer that is the library's own format.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.data.files import parse_json
from bitnet_jax.data.text import checked_text
from bitnet_jax.optional_packages import missing_package

Ids = Sequence[int] | np.ndarray

# End-of-document tokens of published tokenizers; the first one present separates the documents of a stream. Which
# tokens end a generation is stated by the model, see conversation.py.
END_TOKENS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "[SEP]")


@runtime_checkable
class Decoder(Protocol):
    """Streaming decoder: the concatenated pieces equal `decode` of all ids, and no piece ends inside a character."""

    def push(self, ids: Ids) -> str: ...

    def finish(self) -> str: ...


@runtime_checkable
class Tokenizer(Protocol):
    kind: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int | None:
        """The id that separates documents, see streams.py."""

    def encode(self, text: str) -> np.ndarray:
        """int32 [T], without added special tokens."""

    def decode(self, ids: Ids) -> str: ...

    def decoder(self) -> Decoder: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, possibly in several threads."""

    def encode_measured(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode` of each text, and int32 [T]: the number of its UTF-8 bytes that each token stands for.

        They add up to the bytes of the text, whatever the tokenizer strips or replaces, unless it has no tokens.
        """

    def to_json(self) -> str: ...


class ByteTokenizer:
    """One token per byte of the UTF-8 text. Byte 0, which does not occur in text, separates documents."""

    kind = "byte"
    vocab_size = 256
    eos_id = 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(checked_text(text, "text").encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Invalid UTF-8 is replaced by U+FFFD."""
        return _as_bytes(ids).decode(errors="replace")

    def decoder(self) -> Decoder:
        return _ByteDecoder()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_measured(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(ids, np.ones(len(ids), np.int32)) for ids in self.encode_batch(texts)]

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind})


def _as_bytes(ids: Ids) -> bytes:
    return _checked_ids(ids, 256).astype(np.uint8).tobytes()


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Ids) -> str:
        return self._decoder.decode(_as_bytes(ids))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class CharTokenizer:
    """One token per character of a fixed alphabet.

    Args:
      symbols: the alphabet; id = index.
      unknown: the symbol that replaces characters outside the alphabet; None: such a character is an error.
      separator: the symbol that separates documents; None: no separator.
    """

    kind = "char"

    def __init__(self, symbols: str, unknown: str | None = None, separator: str | None = None) -> None:
        if not symbols or len(set(symbols)) != len(symbols):
            raise DataError(
                f"symbols: got {len(symbols)}, {len(set(symbols))} of them distinct; expected at least one, "
                "without duplicates"
            )
        for name, symbol in (("unknown", unknown), ("separator", separator)):
            if symbol is not None and (len(symbol) != 1 or symbol not in symbols):
                raise DataError(
                    f"{name}: got {symbol!r}, expected None or one of the {len(symbols)} symbols; add it"
                )
        self.symbols, self.unknown, self.separator = checked_text(symbols, "symbols"), unknown, separator
        self._codes = _code_points(symbols)
        self._order = np.argsort(self._codes)

    @classmethod
    def fit(
        cls, texts: Iterable[str], unknown: str | None = None, separator: str | None = None
    ) -> CharTokenizer:
        """An alphabet of the sorted characters of the texts and the given special symbols."""
        symbols = {unknown, separator} - {None}
        for text in texts:
            symbols |= set(text)
        return cls("".join(sorted(map(str, symbols))), unknown, separator)

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    @property
    def eos_id(self) -> int | None:
        return None if self.separator is None else self.symbols.index(self.separator)

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(checked_text(text, "text"))
        index = np.searchsorted(self._codes, codes, sorter=self._order)
        ids = self._order[np.minimum(index, len(self.symbols) - 1)]
        outside = self._codes[ids] != codes
        if outside.any():
            if self.unknown is None:
                first = int(np.argmax(outside))
                raise DataError(
                    f"got the character {text[first]!r} at {first}, expected one of the tokenizer's "
                    f"{self.vocab_size} symbols; remove it, or use a tokenizer with an `unknown` symbol"
                )
            ids = np.where(outside, self.symbols.index(self.unknown), ids)
        return ids.astype(np.int32)

    def decode(self, ids: Ids) -> str:
        return "".join(self.symbols[i] for i in _checked_ids(ids, self.vocab_size).tolist())

    def decoder(self) -> Decoder:
        return _CharDecoder(self)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_measured(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.encode(text), _character_bytes(text)) for text in texts]

    def to_json(self) -> str:
        settings = {"symbols": self.symbols, "unknown": self.unknown, "separator": self.separator}
        return json.dumps({"kind": self.kind, **settings})


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _character_bytes(text: str) -> np.ndarray:
    """int32 [characters]: UTF-8 bytes of each character."""
    codes = _code_points(text)
    return 1 + np.searchsorted([0x80, 0x800, 0x10000], codes, side="right").astype(np.int32)


class _CharDecoder:
    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, ids: Ids) -> str:
        return self._tokenizer.decode(ids)

    def finish(self) -> str:
        return ""


class JsonTokenizer:
    """A `tokenizer.json` of the tokenizers library (an optional package).

    `encode` adds no special tokens, but a special token spelled out in the text is encoded as that token; `decode`
    drops special tokens. `eos_id`, used to separate documents, is the first of END_TOKENS in the vocabulary, or None.
    """

    kind = "json"

    def __init__(self, text: str) -> None:
        self._tokenizer, self.library_version = _library_tokenizer(text)
        self._tokenizer.no_padding()  # a file may request padding and truncation of every text
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
        if not 0 < self.vocab_size < 2**31:
            raise DataError(
                f"tokenizer.json: got ids up to {self.vocab_size - 1}, expected at least one token and ids "
                "below 2**31; check the file"
            )
        self.eos_id: int | None = next((vocabulary[name] for name in END_TOKENS if name in vocabulary), None)

    def encode(self, text: str) -> np.ndarray:
        checked_text(text, "text")
        with _library_errors("a text the tokenizer cannot encode"):
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Ids) -> str:
        listed = _checked_ids(ids, self.vocab_size).tolist()
        with _library_errors("ids the tokenizer cannot decode"):
            return self._tokenizer.decode(listed)

    def decoder(self) -> Decoder:
        return _JsonDecoder(self)

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary by its text, special or not."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token_text(self, token: int) -> str | None:
        """The text of a token in the vocabulary, the inverse of `token_id`."""
        found: str | None = self._tokenizer.id_to_token(token)
        return found

    @property
    def splits_words(self) -> bool:
        """Whether words are encoded independently: texts are split into words and not normalized as a whole."""
        local = type(self._tokenizer.model).__name__ in ("BPE", "WordPiece", "WordLevel")
        return local and self._tokenizer.pre_tokenizer is not None and self._tokenizer.normalizer is None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            checked_text(text, "text")
        with _library_errors("a text the tokenizer cannot encode"):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_measured(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        for text in texts:
            checked_text(text, "text")
        with _library_errors("a text the tokenizer cannot encode"):
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [
                (np.array(encoding.ids, np.int32), _bytes_up_to(text, encoding.offsets))
                for text, encoding in zip(texts, encodings, strict=True)
            ]

    def to_json(self) -> str:
        return self._tokenizer.to_str()


def _bytes_up_to(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """int32 [T]: bytes from the end of the previous token to the end of each; the last extends to the end of the text.

    Args:
      offsets: character range (start, end) of each token; tokens may share characters, skip some, or have none (a
        prefix added by the tokenizer).
    """
    if not offsets:
        return np.zeros(0, np.int32)
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64))
    ends = np.minimum(ends, len(text))
    ends[-1] = len(text)
    bytes_before = np.concatenate([[0], np.cumsum(_character_bytes(text), dtype=np.int64)])
    return np.diff(bytes_before[ends], prepend=0).astype(np.int32)


def _library_tokenizer(text: str) -> tuple[Any, str]:
    try:
        from tokenizers import Tokenizer as LibraryTokenizer
        from tokenizers import __version__ as library_version
    except ImportError as error:
        raise DataError(missing_package("tokenizers")) from error
    with _library_errors("a file the tokenizers library cannot read"):
        return LibraryTokenizer.from_str(text), library_version


@contextlib.contextmanager
def _library_errors(got: str) -> Iterator[None]:
    """Convert any exception of the tokenizers library to a DataError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic in the library is not an Exception
        raise DataError(
            f"tokenizer.json: got {got} ({one_line(error)}), expected a complete file supported by this version "
            "of the library; save it again, or install a newer version"
        ) from error


class _JsonDecoder:
    """Decodes the previous piece with and without the new ids, and returns the difference.

    The library may treat the first token of a text specially (drop its space), so new ids are decoded after the
    previous piece. A text that ends in U+FFFD may end inside a character and is held back.
    """

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, ids: Ids) -> str:
        self._held += [int(i) for i in ids]
        piece = self._piece()
        if piece.endswith("\ufffd"):
            return ""
        if piece:  # ids without text (special tokens) are kept as context of the next ones
            self._before, self._held = self._held, []
        return piece

    def finish(self) -> str:
        piece, self._held = self._piece(), []
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._held)[len(before) :]


def _checked_ids(ids: Ids, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids, np.int64)
    if array.ndim != 1:
        raise DataError(f"ids: got shape {array.shape}, expected [T]; decode one sequence at a time")
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise DataError(
            f"ids: got {wrong}, expected 0 to {vocab_size - 1}; use the tokenizer the model was trained with"
        )
    return array


def from_json(text: str) -> Tokenizer:
    """The tokenizer of a file written by `to_json`, or of a `tokenizer.json` of the tokenizers library."""
    content = parse_json(text, "tokenizer.json", "a complete file; save the tokenizer again")
    if not isinstance(content, dict):
        raise DataError(
            f"tokenizer.json: got {type(content).__name__}, expected an object; save the tokenizer again"
        )
    if "model" in content:
        return JsonTokenizer(text)
    kind = content.pop("kind", None)
    if kind == "byte" and not content:
        return ByteTokenizer()
    if kind == "char" and content.keys() == {"symbols", "unknown", "separator"}:
        symbols, special = content["symbols"], (content["unknown"], content["separator"])
        if isinstance(symbols, str) and all(isinstance(symbol, str | None) for symbol in special):
            return CharTokenizer(symbols, *special)
    raise DataError(
        f"tokenizer.json: got kind {kind!r} with the fields {sorted(content)[:8]}, expected kind byte, "
        "kind char with symbols, unknown and separator, or a file of the tokenizers library with the field "
        "model; save the tokenizer again"
    )
