"""The bytes of single tokens: concatenated, they are the text."""

from __future__ import annotations

import pytest

from bitnet_jax.data.token_bytes import token_bytes
from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer
from tests.bitnet_jax.chat_folders import BEGIN, tokenizer_json

TEXT = "Hé 🙂!"


def with_metaspace() -> JsonTokenizer:
    pytest.importorskip("tokenizers", reason="the tokenizers library is an extra")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "H", "é"]
    library = Library(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return JsonTokenizer(library.to_str())


@pytest.mark.parametrize("kind", ["byte", "char", "byte-level", "metaspace"])
def test_the_bytes_of_tokens_are_those_of_the_text(kind: str) -> None:
    tokenizers: dict[str, Tokenizer] = {
        "byte": ByteTokenizer(),
        "char": CharTokenizer("".join(sorted(set(TEXT)))),
    }
    tokenizer = tokenizers.get(kind) or (
        JsonTokenizer(tokenizer_json()) if kind == "byte-level" else with_metaspace()
    )
    of = token_bytes(tokenizer)
    ids = [int(i) for i in tokenizer.encode(TEXT)]
    assert b"".join(map(of, ids)) == TEXT.encode()
    assert of(10**6) == b""


def test_a_special_token_has_the_bytes_of_its_name() -> None:
    tokenizer = JsonTokenizer(tokenizer_json())
    assert tokenizer.decode([BEGIN]) == ""
    assert token_bytes(tokenizer)(BEGIN) == b"<s>"
