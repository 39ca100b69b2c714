"""Byte counts of token streams, for every kind of tokenizer and window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_jax.data import (
    ByteTokenizer,
    CharTokenizer,
    DataError,
    Document,
    JsonTokenizer,
    Tokenizer,
    consecutive_batches,
    files,
    measured_stream,
    streams,
    token_stream,
)
from bitnet_jax.data.documents import LongDocument

TEXT = st.text(st.sampled_from(" \n\tabcTthe\u00e9\u4e2d\U0001f600e\u0301"), max_size=12) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=8
)


def library(model: Callable[[Any], Any], **parts: Callable[[Any], Any]) -> JsonTokenizer:
    pytest.importorskip("tokenizers", reason="the tokenizers library is an extra")
    import tokenizers

    made = tokenizers.Tokenizer(model(tokenizers))
    for name, part in parts.items():
        setattr(made, name, part(tokenizers))
    made.add_special_tokens(["</s>"])
    return JsonTokenizer(made.to_str())


def byte_level(prefix: bool = True) -> JsonTokenizer:
    """Like GPT-2's; with a prefix, a space is prepended."""

    def model(t: Any) -> Any:
        symbols = [*sorted(t.pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
        return t.models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[("t", "h"), ("th", "e")])

    return library(
        model,
        pre_tokenizer=lambda t: t.pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        decoder=lambda t: t.decoders.ByteLevel(),
    )


def sentence_piece() -> JsonTokenizer:
    """Like Llama's: a leading space, byte fallback, and a decoder that strips the first space."""

    def model(t: Any) -> Any:
        symbols = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcth", "th", "\u2581th"]
        return t.models.BPE(
            vocab={s: i for i, s in enumerate(symbols)},
            merges=[("t", "h"), ("\u2581", "th")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )

    return library(
        model,
        normalizer=lambda t: t.normalizers.Sequence(
            [t.normalizers.Prepend("\u2581"), t.normalizers.Replace(" ", "\u2581")]
        ),
        decoder=lambda t: t.decoders.Sequence(
            [
                t.decoders.Replace("\u2581", " "),
                t.decoders.ByteFallback(),
                t.decoders.Fuse(),
                t.decoders.Strip(" ", 1, 0),
            ]
        ),
    )


def metaspace() -> JsonTokenizer:
    return library(
        lambda t: t.models.Unigram(
            [("<unk>", 0.0), *((c, -2.0) for c in "\u2581abcthe"), ("\u2581the", -3.0)], 0
        ),
        pre_tokenizer=lambda t: t.pre_tokenizers.Metaspace(),
        decoder=lambda t: t.decoders.Metaspace(),
    )


def words() -> JsonTokenizer:
    """NFKC, lower case, no accents, no spaces: decoding does not restore the text."""
    return library(
        lambda t: t.models.WordLevel({"<unk>": 0, "the": 1, "a": 2}, unk_token="<unk>"),
        normalizer=lambda t: t.normalizers.Sequence(
            [t.normalizers.NFKD(), t.normalizers.StripAccents(), t.normalizers.Lowercase()]
        ),
        pre_tokenizer=lambda t: t.pre_tokenizers.Whitespace(),
    )


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer("\0?abcthe", unknown="?", separator="\0"),
    "byte_level": lambda: byte_level(prefix=False),
    "byte_level_with_prefix": byte_level,
    "sentence_piece": sentence_piece,
    "metaspace": metaspace,
    "words": words,
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    texts=st.lists(TEXT.filter(bool), min_size=1, max_size=4),
    length=st.integers(1, 9),
    stride=st.integers(1, 9),
    batch_size=st.integers(1, 4),
)
def test_byte_counts_match_the_text_for_any_windows(
    tokenizer: Tokenizer, texts: list[str], length: int, stride: int, batch_size: int
) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    tokens, token_bytes = measured_stream(documents, tokenizer)
    np.testing.assert_array_equal(token_stream(documents, tokenizer), tokens)
    assert (tokens.dtype, token_bytes.dtype, len(tokens)) == (np.int32, np.int32, len(token_bytes))
    assert token_bytes.min() >= 0
    whole = sum(len(text.encode()) for text in texts)
    assert token_bytes.sum() == whole
    batches = consecutive_batches(tokens, length, batch_size, min(stride, length), token_bytes)
    assert sum(int(batch["target_bytes"][batch["scored"]].sum()) for batch in batches) == whole
    # Each document counts its own bytes, wherever the others are.
    assert [len(text.encode()) for text in texts] == [
        int(measured_stream([document], tokenizer).token_bytes.sum()) for document in documents
    ]


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_the_byte_count_of_a_long_text_does_not_depend_on_the_windows(kind: str) -> None:
    """1,320 bytes used to be counted as 1,323 to 1,760: decoded slices lose spaces and split characters."""
    text = "the caf\u00e9 \u4e2d\u6587 th " * 66
    assert len(text.encode()) == 1320
    stream = measured_stream([Document("a", text)], KINDS[kind]())
    for length, batch_size in ((7, 3), (16, 1), (64, 4), (2000, 1)):
        batches = consecutive_batches(stream.tokens, length, batch_size, None, stream.token_bytes)
        assert sum(int(batch["target_bytes"][batch["scored"]].sum()) for batch in batches) == 1320


def test_the_error_names_a_document_that_cannot_be_encoded() -> None:
    documents = [Document("a", "ab"), Document("b", "c")]
    for stream in (token_stream, measured_stream):
        with pytest.raises(DataError, match="b: got the character 'c' at 0"):
            stream(documents, CharTokenizer("ab"))
    with pytest.raises(DataError, match="token_bytes: got 2, expected one for each of the 3 tokens"):
        next(consecutive_batches(np.arange(3), 2, 1, None, np.arange(2)))


def test_encoding_in_batches_gives_the_same_stream(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(str(i), "the cat " * (i % 5 + 1)) for i in range(30)]
    whole = measured_stream(documents, tokenizer)
    for size in (1, 50):
        monkeypatch.setattr(streams, "BATCH_CHARACTERS", size)
        part = measured_stream(documents, tokenizer)
        np.testing.assert_array_equal(part.tokens, whole.tokens)
        np.testing.assert_array_equal(part.token_bytes, whole.token_bytes)


@settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    text=st.text(st.sampled_from("  \n\n\r\tathe.9'\u00e9\u0301\u4e2d"), min_size=1, max_size=80),
    size=st.integers(1, 20),
)
def test_encoding_a_long_document_in_pieces_gives_the_same_stream(
    tokenizer: Tokenizer, text: str, size: int
) -> None:
    documents = [Document("a", text), Document("b", text[::-1])]
    whole = measured_stream(documents, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "PIECE_CHARACTERS", size)
        part = measured_stream(documents, tokenizer)
    np.testing.assert_array_equal(part.tokens, whole.tokens)
    np.testing.assert_array_equal(part.token_bytes, whole.token_bytes)


def test_a_file_read_in_parts_gives_the_same_stream(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the caf\u00e9 \u4e2d\u6587 th\n 9 the\U0001f600 " * 40
    (tmp_path / "a").write_text(text)
    whole = measured_stream([Document("a", text), Document("b", text[7:300])], tokenizer)
    monkeypatch.setattr(files, "BLOCK", 7)  # cuts characters too
    monkeypatch.setattr(streams, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(streams, "AROUND_CUT", 10)
    long = [LongDocument("a", tmp_path / "a"), LongDocument("b", tmp_path / "a", start=7, stop=300)]
    part = measured_stream(long, tokenizer)
    np.testing.assert_array_equal(part.tokens, whole.tokens)
    np.testing.assert_array_equal(part.token_bytes, whole.token_bytes)


def test_a_long_document_is_split_only_at_word_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file of 34 MB used to take 5 GB: the library keeps data for every token until the text is done."""
    text = "the cat.\n the cat\n  9\n" * 20
    monkeypatch.setattr(streams, "AROUND_CUT", 10)

    def pieces(kind: str) -> list[str]:
        return [piece.text for piece in streams._pieces(Document("a", text), KINDS[kind]())]

    for kind in KINDS:
        assert "".join(pieces(kind)) == text
    monkeypatch.setattr(streams, "PIECE_CHARACTERS", 40)
    cut = pieces("byte_level")
    assert "".join(cut) == text
    assert max(map(len, cut)) < 80
    assert {piece[-3:] for piece in cut[:-1]} <= {"the", "cat"}
    # These tokenizers would prepend a space to each piece, or normalize across pieces: the text stays whole.
    for kind in ("sentence_piece", "metaspace", "words"):
        assert pieces(kind) == [text]
