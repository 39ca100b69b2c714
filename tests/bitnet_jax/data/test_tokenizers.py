"""Tokenizers: round trips, streaming, serialization, and damaged files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_jax.data import ByteTokenizer, CharTokenizer, DataError, JsonTokenizer, Tokenizer, from_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # everything except surrogates
ALPHABET = "\n !abcé\u4e2d\U0001f600"


def bpe(**changes: object) -> str:
    """A byte-level BPE with 256 bytes, two merges and an end token, as written by the tokenizers library."""
    pytest.importorskip("tokenizers", reason="the tokenizers library is an extra")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, "th", "the"])}
    library = Library(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    return json.dumps(json.loads(library.to_str()) | changes)


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer(ALPHABET + "\0", separator="\0"),
    "json": lambda: JsonTokenizer(bpe()),
}


@pytest.fixture(params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def text_for(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    return st.text(ALPHABET) if tokenizer.kind == "char" else TEXT


# Sharing one stateless tokenizer between all examples is intended.
ONE_TOKENIZER = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    max_examples=60,
)


@ONE_TOKENIZER
@given(data=st.data())
def test_round_trip(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(text_for(tokenizer))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    (again,) = tokenizer.encode_batch([text])
    ((measured, sizes),) = tokenizer.encode_measured([text])
    np.testing.assert_array_equal(again, ids)
    np.testing.assert_array_equal(measured, ids)
    assert (sizes.dtype, len(sizes), sizes.sum()) == (np.int32, len(ids), len(text.encode()))


@ONE_TOKENIZER
@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any ids, including ones that are not valid text, in any pieces."""
    if data.draw(st.booleans()):
        ids = tokenizer.encode(data.draw(text_for(tokenizer))).tolist()
    else:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    decoder, pieces, place = tokenizer.decoder(), [], 0
    while place < len(ids):
        size = data.draw(st.integers(1, 4))
        pieces.append(decoder.push(ids[place : place + size]))
        place += size
    pieces.append(decoder.finish())
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte", "json"])
def test_a_stream_holds_back_incomplete_characters(kind: str) -> None:
    tokenizer = MAKERS[kind]()
    decoder = tokenizer.decoder()
    ids = tokenizer.encode("a\U0001f600b")
    assert len(ids) == 6
    assert [decoder.push([i]) for i in ids] == ["a", "", "", "", "\U0001f600", "b"]
    decoder.push(ids[1:3])
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


@ONE_TOKENIZER
@given(data=st.data())
def test_json_round_trip(tokenizer: Tokenizer, data: st.DataObject) -> None:
    again = from_json(tokenizer.to_json())
    assert type(again) is type(tokenizer)
    assert (again.kind, again.vocab_size, again.eos_id) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eos_id,
    )
    assert again.to_json() == tokenizer.to_json()
    text = data.draw(text_for(tokenizer))
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_separators() -> None:
    assert (ByteTokenizer.vocab_size, ByteTokenizer.eos_id) == (256, 0)
    assert ByteTokenizer().encode("\u00e9z").tolist() == [0xC3, 0xA9, 0x7A]
    char = CharTokenizer.fit(["ba", "cab"], separator="\0")
    assert (char.symbols, char.vocab_size, char.eos_id) == ("\0abc", 4, 0)
    assert CharTokenizer.fit(["ba"]).eos_id is None
    json_tokenizer = JsonTokenizer(bpe())
    assert (json_tokenizer.vocab_size, json_tokenizer.eos_id) == (259, 258)


def test_invalid_ids_are_rejected(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size):
        for use in (tokenizer.decode, tokenizer.decoder().push):
            with pytest.raises(DataError, match=f"got {wrong}, expected 0 to {tokenizer.vocab_size - 1}"):
                use([1, wrong])
    with pytest.raises(DataError, match=r"shape \(1, 2\)"):
        tokenizer.decode(np.array([[1, 2]]))
    assert tokenizer.decode([]) == ""


def test_text_that_cannot_be_encoded(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


# ---- characters


def test_a_character_counts_with_its_first_token() -> None:
    """A byte-level vocabulary splits characters; a character's bytes are attributed to its first token."""
    text = "a\u00e9\U0001f600the"
    ((ids, sizes),) = JsonTokenizer(bpe()).encode_measured([text])
    assert len(ids) == 8
    assert sizes.tolist() == [1, 2, 0, 4, 0, 0, 0, 3]
    unknown = CharTokenizer("ab?", unknown="?").encode_measured(["a\u4e2d"])
    assert [sizes.tolist() for _, sizes in unknown] == [
        [1, 3]
    ]  # the bytes of the text, not of the question mark


def test_symbols_outside_the_alphabet() -> None:
    with pytest.raises(
        DataError, match="got the character 'z' at 2, expected one of the tokenizer's 3 symbols"
    ):
        CharTokenizer("abc").encode("abz")
    known = CharTokenizer("cab?", unknown="?")
    assert known.encode("a\U0001f600bz").tolist() == [1, 3, 2, 3]
    assert from_json(known.to_json()).encode("~").tolist() == [3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("",), "symbols: got 0"),
        (("aa",), "2, 1 of them distinct"),
        (("ab", "c"), "unknown: got 'c'"),
        (("ab", None, "ab"), "separator: got 'ab'"),
        (("a\ud800",), "lone surrogate"),
    ],
)
def test_invalid_alphabets_are_rejected(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        CharTokenizer(*arguments)


# ---- tokenizer.json


def test_llama3_cases_match_exactly(oracles: Path) -> None:
    pytest.importorskip("tokenizers", reason="the tokenizers library is an extra")
    folder = oracles / "tokenizer"
    tokenizer = from_json((folder / "tokenizer.json").read_text())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (128_256, 128_001)
    cases = json.loads((folder / "cases.json").read_text())
    assert len(cases) == 47
    for case in cases:
        assert tokenizer.encode(case["text"]).tolist() == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]
        ((_, sizes),) = tokenizer.encode_measured([case["text"]])
        assert sizes.sum() == len(case["text"].encode())
        decoder = tokenizer.decoder()
        assert "".join([decoder.push([i]) for i in case["ids"]] + [decoder.finish()]) == case["text"]
    for case in json.loads((folder / "chat_cases.json").read_text()):
        assert tokenizer.encode(case["text"]).tolist() == case["ids"]


def test_truncation_and_padding_are_disabled() -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    tokenizer = JsonTokenizer(bpe(truncation=truncation, padding=padding))
    assert tokenizer.decode(tokenizer.encode("longer than four")) == "longer than four"
    assert len(tokenizer.encode("ab")) == 2


def test_the_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bpe()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install tokenizers"):
        from_json(content)


def test_text_on_which_the_library_fails() -> None:
    """A word-level vocabulary without a token for unknown words raises inside the library."""
    model = {"type": "WordLevel", "vocab": {"known": 0}, "unk_token": "[UNK]"}
    tokenizer = JsonTokenizer(bpe(model=model, added_tokens=[], pre_tokenizer=None, decoder=None))
    assert tokenizer.encode("known").tolist() == [0]
    with pytest.raises(DataError, match="cannot encode"):
        tokenizer.encode("other")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "damaged JSON"),
        ("[" * 1_000_000, "damaged JSON"),
        ('{"model": ' * 100_000, "damaged JSON"),
        ('{"kind": ' + "9" * 10_000 + "}", "JSON that cannot be read"),
        ("[1]", "got list"),
        ("{}", "got kind None"),
        ('{"kind": "byte", "more": 1}', "got kind 'byte'"),
        ('{"kind": "char", "symbols": "ab"}', "got kind 'char'"),
        ('{"kind": "char", "symbols": ["a"], "unknown": null, "separator": null}', "got kind 'char'"),
        ('{"kind": "char", "symbols": "ab", "unknown": 1, "separator": null}', "got kind 'char'"),
        ('{"kind": "char", "symbols": "aa", "unknown": null, "separator": null}', "1 of them distinct"),
        ('{"kind": {}}', "got kind {}"),
    ],
)
def test_damaged_files_are_rejected(content: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        from_json(content)
    assert "\n" not in str(caught.value)


def test_files_rejected_by_the_library() -> None:
    for content in (
        '{"model": {}}',
        bpe()[:-20] + "}",
        bpe(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
    ):
        with pytest.raises(DataError, match="tokenizer.json"):
            from_json(content)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_fuzzed_files_are_read_or_refused(data: st.DataObject) -> None:
    """Random text, random JSON, and small damages to good files; whatever is accepted must also work."""
    good = data.draw(st.sampled_from(sorted(MAKERS)))
    content = MAKERS[good]().to_json()
    how = data.draw(st.sampled_from(["text", "json", "cut", "characters", "field"]))
    if how == "text":
        content = data.draw(st.text())
    elif how == "json":
        leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
        content = json.dumps(
            data.draw(st.recursive(leaf, lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
        )
    elif how == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif how == "characters":
        place = data.draw(st.integers(0, len(content) - 1))
        content = content[:place] + data.draw(st.text(min_size=1, max_size=2)) + content[place + 1 :]
    else:
        fields = json.loads(content)
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(
            st.none() | st.integers() | st.text(max_size=3) | st.just({}) | st.just([{}])
        )
        content = json.dumps(fields)
    message = ""
    try:
        tokenizer = from_json(content)
        tokenizer.decode(tokenizer.encode("ab"))
    except DataError as error:
        message = str(error)
    assert "\n" not in message
