"""Tokenizers of GGUF files: ids of other people's programs, both ways, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.tokenizers import ByteTokenizer, Tokenizer, from_json
from bitnet_jax.interop import gguf_file, gguf_writer
from bitnet_jax.interop.gguf_file import Value
from bitnet_jax.interop.gguf_pretokenizers import PRE_TOKENIZERS
from bitnet_jax.interop.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    read_conversation,
    read_tokenizer,
)
from bitnet_jax.interop.gguf_tokenizer_export import metadata_of

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def keys(**entries: Value | None) -> dict[str, Value]:
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def byte_level(**changes: Value | None) -> dict[str, Value]:
    """A small byte-level vocabulary: the alphabet, two joins and a control token."""
    tokens = [*ALPHABET, "ab", "Ġab", "<|end|>"]
    entries = {
        "model": Value("string", "gpt2"),
        "pre": Value("string", "gpt-2"),
        "tokens": Value("string[]", tokens),
        "token_type": Value("i32[]", np.array([NORMAL] * (len(tokens) - 1) + [CONTROL], np.int32)),
        "merges": Value("string[]", ["a b", "Ġ ab"]),
    }
    return keys(**entries | changes)


def built(metadata: dict[str, Value]) -> Tokenizer:
    text = read_tokenizer(metadata)
    assert text is not None
    return from_json(text)


def rewritten(
    text: str, path: Path, conversation: Conversation, vocab_size: int | None = None
) -> dict[str, Value]:
    gguf_writer.write(path, metadata_of(text, conversation, vocab_size=vocab_size), [])
    return gguf_file.read(path).metadata


@pytest.mark.slow
def test_llama_3_by_way_of_a_file(oracles: Path, tmp_path: Path) -> None:
    text = (oracles / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    conversation = Conversation((128000,), (128001, 128009), "{{ messages }}")
    metadata = rewritten(text, tmp_path / "t.gguf", conversation, 128256)
    assert metadata["tokenizer.ggml.pre"].value == "llama-bpe"
    assert read_conversation(metadata) == conversation
    tokenizer = built(metadata)
    cases = json.loads((oracles / "tokenizer" / "cases.json").read_text(encoding="utf-8"))
    assert len(cases) == 47
    for case in cases:
        assert tokenizer.encode(case["text"]).tolist() == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_the_tokenizer_of_the_tiny_files(oracles: Path, tmp_path: Path) -> None:
    folder = oracles / "gguf" / "model_tiny"
    metadata = gguf_file.read(folder / "model.i2_s.gguf").metadata
    conversation = read_conversation(metadata)
    assert (conversation.begin, conversation.end, conversation.template) == ((368,), (369,), None)
    assert dict(conversation.special_tokens) == {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>",
    }  # fmt: skip
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    cases = json.loads((folder / "tokenizer_cases.json").read_text(encoding="utf-8"))
    for tokenizer in (built(metadata), built(rewritten(text, tmp_path / "t.gguf", conversation))):
        for case in cases:
            assert tokenizer.encode(case["text"]).tolist() == case["ids"], case["text"]
    written = metadata_of(text, conversation)
    for key in written.keys() & metadata.keys():
        np.testing.assert_array_equal(written[key].value, metadata[key].value, key)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "I'm 12345 ok!!", ["I", "'m", "Ġ12345", "Ġok", "!!"]),
        ("smollm", "I'm 12345 ok!!", ["I", "'m", "Ġ", "1", "2", "3", "4", "5", "Ġok", "!!"]),
        ("llama-bpe", "I'M 12345 ok!!\n\n", ["I", "'M", "Ġ", "123", "45", "Ġok", "!!ĊĊ"]),
        ("qwen2", "I'M 123 e\u0301", ["I", "'M", "Ġ", "1", "2", "3", "ĠÃ©"]),
        ("default", "I'm 12345 ok!!", ["I", "'", "m", "Ġ", "123", "45", "Ġok", "!!"]),
    ],
)
def test_how_text_is_split(pre: str, text: str, pieces: list[str]) -> None:
    content = read_tokenizer(byte_level(pre=Value("string", pre)))
    assert content is not None
    tokenizer = tokenizers.Tokenizer.from_str(content)
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("pre", list(PRE_TOKENIZERS))
def test_every_splitting_returns_from_a_tokenizer_json(pre: str) -> None:
    """Also in the library's own spelling, and under the first of several names."""
    text = read_tokenizer(byte_level(pre=Value("string", pre)))
    assert text is not None
    for spelling in (text, tokenizers.Tokenizer.from_str(text).to_str()):
        name = metadata_of(spelling)["tokenizer.ggml.pre"].value
        assert PRE_TOKENIZERS[name] == PRE_TOKENIZERS[pre]


def test_without_a_name_llama_cpps_default_or_bitnets() -> None:
    for architecture, pre in {"llama": "default", "bitnet-b1.58": "llama-bpe"}.items():
        metadata = byte_level(pre=None) | {"general.architecture": Value("string", architecture)}
        assert read_tokenizer(metadata) == read_tokenizer(byte_level(pre=Value("string", pre)))


def test_tokens_that_are_matched_in_text_and_unused_ids() -> None:
    text = read_tokenizer(byte_level())
    assert text is not None
    tokenizer = built(metadata_of(text, vocab_size=300))
    end = len(ALPHABET) + 2
    assert tokenizer.encode("ab ab<|end|>").tolist() == [end - 2, end - 1, end]
    assert tokenizer.decode([end - 2, end - 1, end]) == "ab ab"  # control tokens have no text
    assert tokenizer.vocab_size == end + 1
    assert metadata_of(text, vocab_size=300)["tokenizer.ggml.tokens"].value[-1] == "[PAD299]"


SPM_PIECES = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc", "▁abc", "cc", "ca"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_PIECES]


def sentence_piece(**changes: Value | None) -> dict[str, Value]:
    scores = np.zeros(len(SPM_TOKENS), np.float32)
    scores[259:] = -np.array([90, 91, 92, 93, 4, 1, 6, 2, 3, 0, 5, 7])
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(SPM_PIECES)]
    entries = {
        "model": Value("string", "llama"),
        "tokens": Value("string[]", SPM_TOKENS),
        "scores": Value("f32[]", scores),
        "token_type": Value("i32[]", np.array(types, np.int32)),
        "unknown_token_id": Value("u32", 0),
    }
    return keys(**entries | changes)


def by_scores(text: str, scores: np.ndarray) -> list[int]:
    """SentencePiece BPE as llama.cpp does it: the join with the highest score, leftmost first, until there is none."""
    index = {token: i for i, token in enumerate(SPM_TOKENS)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (-scores[index[a + b]], i)
            for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
            if a + b in index
        ]
        if not joins:
            break
        _, i = min(joins)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids: list[int] = []
    for piece in pieces:
        ids += [index[piece]] if piece in index else [3 + byte for byte in piece.encode()]
    return ids


def test_sentence_piece_joins_by_score_and_falls_back_to_bytes() -> None:
    metadata = sentence_piece()
    tokenizer = built(metadata)
    again = built(metadata_of(read_tokenizer(metadata) or ""))
    generator = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(generator.choice(list("aabbcc é漢"), size=generator.integers(1, 20)))
        expected = by_scores(text, metadata["tokenizer.ggml.scores"].value)
        assert tokenizer.encode(text).tolist() == expected, text
        assert again.encode(text).tolist() == expected, text
        assert tokenizer.decode(expected) == text
    without = built(sentence_piece(add_space_prefix=Value("bool", False)))
    assert without.encode("ab").tolist() == by_scores("ab", metadata["tokenizer.ggml.scores"].value)[:0] + [
        263
    ]


ID = Value("u32", 7)
YES, NO = Value("bool", True), Value("bool", False)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, Conversation()),
        (byte_level(bos_token_id=ID, eos_token_id=ID), Conversation((), (7,))),
        (byte_level(bos_token_id=ID, add_bos_token=YES), Conversation((7,))),
        (byte_level(bos_token_id=ID, pre=Value("string", "llama-bpe")), Conversation((7,))),
        (byte_level(bos_token_id=ID, pre=Value("string", "llama-bpe"), add_bos_token=NO), Conversation()),
        (sentence_piece(), Conversation((1,), (2,))),
        (sentence_piece(eos_token_id=ID, bos_token_id=ID, add_bos_token=YES), Conversation((7,), (7,))),
        (
            byte_level(eos_token_id=ID, eot_token_id=Value("u32", 8), eom_token_id=ID),
            Conversation((), (7, 8)),
        ),
        (byte_level() | {"tokenizer.chat_template": Value("string", "x")}, Conversation(template="x")),
    ],
)
def test_begin_and_end(metadata: dict[str, Value], expected: Conversation) -> None:
    """Never by the text of a token: <|end|> above is none."""
    found = read_conversation(metadata)
    assert dataclasses.replace(found, special_tokens=()) == expected


def test_a_file_without_tokenizer_has_none() -> None:
    assert read_tokenizer({}) is None


TYPES = Value("i32[]", np.ones(3, np.int32))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(model=Value("string", "bert")), "model is 'bert', expected gpt2 or llama"),
        (byte_level(pre=Value("string", "tekken")), "pre is 'tekken', expected one of llama-bpe"),
        (byte_level(tokens=None), "tokens is of the kind nothing"),
        (byte_level(tokens=Value("string[]", [])), "tokens is of the kind string"),
        (
            byte_level(tokens=Value("string[]", ["a", "b", "a"]), token_type=None),
            "token 2 is a repetition of 0: 'a'",
        ),
        (
            byte_level(tokens=Value("string[]", ["a", "\udcff"]), token_type=None),
            "tokens: entry 1 is not UTF-8",
        ),
        (byte_level(token_type=TYPES), "token_type is of the kind i32.*expected i32.* with 259 entries"),
        (byte_level(merges=None), "merges is of the kind nothing"),
        (byte_level(merges=Value("string[]", ["ab"])), "merges: entry 0, 'ab', does not join"),
        (byte_level(merges=Value("string[]", ["a b", "b b"])), "merges: entry 1, 'b b', does not join"),
        (sentence_piece(scores=None), "scores is missing"),
        (sentence_piece(scores=Value("f32[]", np.zeros(3, np.float32))), "with 271 entries"),
        (sentence_piece(unknown_token_id=Value("u32", 999)), "unknown_token_id is .* 0 to 270"),
        (sentence_piece(add_space_prefix=Value("u8", 1)), "add_space_prefix is of the kind u8"),
    ],
)
def test_tokenizers_that_are_refused(metadata: dict[str, Value], message: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer.ggml.*{message}"):
        read_tokenizer(metadata)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(add_bos_token=YES), "add_bos_token is true, but there is no bos_token_id"),
        (byte_level(eos_token_id=Value("u32", 259)), "eos_token_id is .*from 0 to 258"),
        (byte_level(eos_token_id=Value("string", "x")), "eos_token_id is"),
        (byte_level(add_eos_token=YES), "add_eos_token is true"),
        (byte_level(add_bos_token=Value("u8", 1)), "add_bos_token is of the kind u8, expected bool"),
        ({"tokenizer.chat_template": ID}, "chat_template is of the kind u32"),
    ],
)
def test_conversations_that_are_refused(metadata: dict[str, Value], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_conversation(metadata)


def changed(**changes: Any) -> str:
    content = json.loads(read_tokenizer(byte_level()) or "")
    for path, value in changes.items():
        part = content
        *outer, last = path.split("__")
        for key in outer:
            part = part[int(key) if key.isdigit() else key]
        part[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (ByteTokenizer().to_json(), {}, "of the kind 'byte'"),
        (
            changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            {},
            "'WordLevel', expected BPE",
        ),
        (
            changed(pre_tokenizer={"type": "Whitespace"}),
            {},
            "got the pre-tokenizer.*expected those of one of llama-bpe",
        ),
        (changed(normalizer={"type": "NFKC"}), {}, "NFKC"),
        (changed(model__dropout=0.5), {}, "dropout=0.5"),
        (changed(added_tokens__0__lstrip=True), {}, "'<|end|>' has lstrip"),
        (changed(), {"vocab_size": 10}, "ids up to 258, the model has 10 tokens"),
        (changed(), {"conversation": Conversation(begin=(1, 2))}, "2 begin and 0 end ids"),
        (changed(), {"conversation": Conversation(end=(999,))}, "eos_token_id is"),
        (changed(model__byte_fallback=True), {}, "unk_token=None with byte fallback"),
    ],
)
def test_what_is_not_written(text: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        metadata_of(text, **arguments)
