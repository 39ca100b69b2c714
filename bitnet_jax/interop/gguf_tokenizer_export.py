"""tokenizer.json of the tokenizers library -> tokenizer metadata of GGUF files, checked by reading it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.tokenizers import JsonTokenizer, from_json
from bitnet_jax.interop.gguf_file import Value
from bitnet_jax.interop.gguf_pretokenizers import name_of
from bitnet_jax.interop.gguf_tokenizer import (
    BYTE,
    CONTROL,
    ENDS,
    KEY,
    NAMED_TOKENS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_conversation,
    read_tokenizer,
)


def metadata_of(
    tokenizer: str, conversation: Conversation | None = None, *, vocab_size: int | None = None
) -> dict[str, Value]:
    """The keys of a tokenizer and of what its model's prompts look like.

    Args:
      tokenizer: text of a tokenizer.json with a BPE model: byte-level, or with byte fallback (SentencePiece).
      conversation: None: the file says nothing, which means the defaults of `read_conversation`.
      vocab_size: of the model; ids that the tokenizer does not use become unused tokens.

    Raises:
      ValueError: GGUF has no form for the tokenizer or the conversation, or the tokenizer read back would differ.
    """
    if (kind := from_json(tokenizer).kind) != JsonTokenizer.kind:
        raise ValueError(
            f"got a tokenizer of the kind {kind!r}, expected one of the tokenizers library with a BPE model"
        )
    parsed = json.loads(tokenizer)
    model = parsed["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(
            f"tokenizer.json: got the model {model['type']!r}, expected BPE, which GGUF files can hold"
        )
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ValueError(
                f"tokenizer.json: got {setting}={model[setting]!r}, which GGUF files cannot hold"
            )
    added = parsed.get("added_tokens") or []
    names = {index: token for token, index in model["vocab"].items()}
    names |= {token["id"]: token["content"] for token in added}
    count = max(names) + 1
    if vocab_size is not None and not count <= vocab_size:
        raise ValueError(f"tokenizer.json: got ids up to {count - 1}, the model has {vocab_size} tokens")
    count = vocab_size or count
    types = np.array([NORMAL if index in names else UNUSED for index in range(count)], np.int32)
    tokens = [names.get(index, f"[PAD{index}]") for index in range(count)]
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    entries: dict[str, Value] = {}
    if model.get("byte_fallback"):
        entries |= _sentence_piece(parsed, tokens, types, merges)
    else:
        entries["model"] = Value("string", "gpt2")
        entries["pre"] = Value("string", name_of(parsed))
        entries["merges"] = Value("string[]", [" ".join(merge) for merge in merges])
    for token in added:
        _check_added(token, parsed.get("normalizer"))
        unknown = token["content"] == model.get("unk_token")
        types[token["id"]] = UNKNOWN if unknown else CONTROL if token.get("special") else USER_DEFINED
    entries |= {"tokens": Value("string[]", tokens), "token_type": Value("i32[]", types)}
    metadata = {KEY + key: value for key, value in entries.items()}
    metadata |= {} if conversation is None else _conversation_keys(conversation, tokens)
    _check_read_back(metadata, parsed, names, merges)
    if conversation is not None:
        found, begin = read_conversation(metadata), _begin(conversation)
        kept = (begin, set(conversation.end), conversation.template)
        if (found.begin, set(found.end), found.template) != kept:
            raise ValueError(f"got {conversation}, but a file with this tokenizer means {found}")
        for name, text in conversation.template_tokens.items():
            if (means := dict(found.special_tokens).get(name)) != text:
                raise ValueError(
                    f"the chat template uses {name}, got {text!r}, but a GGUF file with these begin and end tokens "
                    f"means {means!r}"
                )
    return metadata


def _sentence_piece(
    parsed: Mapping[str, Any], tokens: list[str], types: np.ndarray, merges: list[list[str]]
) -> dict[str, Value]:
    """A token's score is minus the rank of its first merge; tokens that no merge makes come last."""
    rank = {left + right: index for index, (left, right) in reversed(list(enumerate(merges)))}
    scores = np.array([-rank.get(token, len(merges)) for token in tokens], np.float32)
    types[[index for index, token in enumerate(tokens) if len(token) == 6 and token[:3] == "<0x"]] = BYTE
    if (unknown := parsed["model"].get("unk_token")) not in tokens:
        raise ValueError(f"tokenizer.json: got unk_token={unknown!r} with byte fallback, expected a token")
    types[tokens.index(unknown)] = UNKNOWN
    return {
        "model": Value("string", "llama"),
        "scores": Value("f32[]", scores),
        "unknown_token_id": Value("u32", tokens.index(unknown)),
        "add_space_prefix": Value("bool", '"Prepend"' in json.dumps(parsed.get("normalizer"))),
    }


def _check_added(token: Mapping[str, Any], normalizer: Any) -> None:
    flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
    flags += (
        ["normalized"] if token.get("normalized") and normalizer is not None and token.get("special") else []
    )
    if flags:
        raise ValueError(
            f"tokenizer.json: the added token {token['content']!r} has {flags[0]}, which GGUF cannot hold"
        )


def _begin(conversation: Conversation) -> tuple[int, ...]:
    """Those before prompts: the format has no others, such as those before documents of a model trained here."""
    return conversation.begin if conversation.begins_prompts else ()


def _conversation_keys(conversation: Conversation, tokens: list[str]) -> dict[str, Value]:
    begin = _begin(conversation)
    if len(begin) > 1 or len(conversation.end) > len(ENDS):
        raise ValueError(
            f"got {len(begin)} begin and {len(conversation.end)} end ids, expected at most 1 and "
            f"{len(ENDS)} in a GGUF file"
        )
    # The first is the eos_token of the template too; any of them ends an answer.
    named = dict(conversation.special_tokens).get("eos_token")
    ends = sorted(conversation.end, key=lambda index: index >= len(tokens) or tokens[index] != named)
    ids = dict(zip(ENDS, ends, strict=False))
    if begin:
        ids["bos_token_id"] = begin[0]
    metadata = {KEY + key: Value("u32", value) for key, value in ids.items()}
    for key, name in NAMED_TOKENS.items():
        if (text := dict(conversation.special_tokens).get(name)) is not None and text in tokens:
            metadata.setdefault(f"{KEY}{key}_token_id", Value("u32", tokens.index(text)))
    metadata[KEY + "add_bos_token"] = Value("bool", bool(begin))
    if conversation.template is not None:
        metadata["tokenizer.chat_template"] = Value("string", conversation.template)
    return metadata


def _check_read_back(
    metadata: Mapping[str, Value],
    parsed: Mapping[str, Any],
    names: Mapping[int, str],
    merges: list[list[str]],
) -> None:
    again = json.loads(read_tokenizer(metadata) or "{}")
    kept = {
        "vocabulary": ({token: index for index, token in names.items()}, again["model"]["vocab"]),
        "merges": (merges, again["model"]["merges"]),
        "normalizer": (parsed.get("normalizer"), again["normalizer"]),
        "added tokens": (
            {token["content"]: bool(token.get("special")) for token in parsed.get("added_tokens") or []},
            {token["content"]: token["special"] for token in again["added_tokens"]},
        ),
    }
    if again["model"]["byte_fallback"]:
        kept |= {key: (parsed.get(key), again[key]) for key in ("pre_tokenizer", "decoder")}
    for what, (given, found) in kept.items():
        if given != found:
            raise ValueError(
                f"tokenizer.json: its {what} would change in a GGUF file; such tokenizers are not supported"
            )
