"""Tokenizers of GGUF files -> tokenizer.json of the tokenizers library, and what the file says about prompts.

`tokenizer.ggml.model` is "gpt2", byte-level BPE whose splitting has the name `tokenizer.ggml.pre`, or "llama",
SentencePiece BPE with byte fallback, whose merges follow from the scores. Without `pre`, "default" is meant, as in
llama.cpp, but Llama 3's in files of BitNet models, which never have it.

Special tokens are the tokens of the types unknown and control; user-defined ones are matched in text too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.interop.gguf_file import Value
from bitnet_jax.interop.gguf_pretokenizers import PRE_TOKENIZERS
from bitnet_jax.packed.tensor_file import StorageError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
KEY = "tokenizer.ggml."
_SPACE = "\u2581"
# Token in metadata -> variable of the chat template.
NAMED_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def read_tokenizer(metadata: Mapping[str, Value]) -> str | None:
    """The text of a tokenizer.json; None if the file has no tokenizer.

    Raises:
      StorageError: a kind, pre-tokenizer or token that is not supported, or keys that contradict each other.
    """
    if KEY + "model" not in metadata:
        return None
    kind, tokens = _kind(metadata), _tokens(metadata)
    types = _numbers(metadata, "token_type", "i32[]", len(tokens))
    types = np.full(len(tokens), NORMAL) if types is None else types
    vocabulary = {
        token: index
        for index, token in enumerate(tokens)
        if not (types[index] == UNUSED and token == f"[PAD{index}]")
    }
    added = [
        {"id": index, "content": tokens[index], **_ADDED, "special": bool(types[index] != USER_DEFINED)}
        for index in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
    ]
    parts = (
        _byte_level(metadata, vocabulary) if kind == "gpt2" else _sentence_piece(metadata, vocabulary, tokens)
    )
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
    }
    return json.dumps(whole | parts, ensure_ascii=False)


def read_conversation(metadata: Mapping[str, Value]) -> Conversation:
    """Begin and end ids and the chat template. Raises StorageError: an id beyond the vocabulary, or an unsupported key.

    Begin: bos_token_id if add_bos_token is true. Defaults as in llama.cpp (src/llama-vocab.cpp): true for "llama" and
    for "gpt2" with Llama 3's pre-tokenizer by name, else false; the ids 1 and 2 for bos and eos of "llama", else none.
    End: eos_token_id, eot_token_id and eom_token_id.
    """
    template = metadata.get("tokenizer.chat_template")
    if template is not None and template.kind != "string":
        raise StorageError(f"tokenizer.chat_template is of the kind {template.kind}, expected a string")
    text = None if template is None else template.value
    if KEY + "model" not in metadata:
        return Conversation(template=text)
    kind, tokens = _kind(metadata), _tokens(metadata)
    count = len(tokens)
    if _flag(metadata, "add_eos_token", False):
        raise StorageError(f"{KEY}add_eos_token is true: an end token after each prompt is not supported")
    pre = metadata.get(KEY + "pre")
    begins = kind == "llama" or (pre is not None and PRE_TOKENIZERS[_pre(metadata)].begins)
    begin = _id(metadata, "bos_token_id", count, 1 if kind == "llama" else None)
    if _flag(metadata, "add_bos_token", begins) and begin is None:
        raise StorageError(f"{KEY}add_bos_token is true, but there is no bos_token_id")
    ends = [
        _id(metadata, key, count, 2 if kind == "llama" and key == "eos_token_id" else None) for key in ENDS
    ]
    return Conversation(
        begin=(begin,) if begin is not None and _flag(metadata, "add_bos_token", begins) else (),
        end=tuple(dict.fromkeys(end for end in ends if end is not None)),
        template=text,
        special_tokens=_special_tokens(metadata, kind, tokens),
    )


def _special_tokens(
    metadata: Mapping[str, Value], kind: str, tokens: list[str]
) -> tuple[tuple[str, str], ...]:
    """The variables of the chat template that name tokens, such as bos_token."""
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    found = []
    for key, name in NAMED_TOKENS.items():
        if (index := _id(metadata, f"{key}_token_id", len(tokens), defaults.get(key))) is not None:
            found.append((name, tokens[index]))
    return tuple(found)


def _kind(metadata: Mapping[str, Value]) -> str:
    kind = metadata[KEY + "model"]
    if kind.value not in ("gpt2", "llama"):
        raise StorageError(f"{KEY}model is {str(kind.value)[:40]!r}, expected gpt2 or llama")
    return kind.value


def _pre(metadata: Mapping[str, Value]) -> str:
    architecture = metadata.get("general.architecture", Value("string", "")).value
    absent = "llama-bpe" if str(architecture).startswith("bitnet") else "default"
    name = metadata.get(KEY + "pre", Value("string", absent)).value
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise StorageError(f"{KEY}pre is {str(name)[:40]!r}, expected one of {', '.join(PRE_TOKENIZERS)}")
    return name


def _tokens(metadata: Mapping[str, Value]) -> list[str]:
    tokens = _strings(metadata, "tokens")
    if len(set(tokens)) != len(tokens):
        first = {token: index for index, token in reversed(list(enumerate(tokens)))}
        index = next(index for index, token in enumerate(tokens) if first[token] != index)
        raise StorageError(
            f"{KEY}tokens: token {index} is a repetition of {first[tokens[index]]}: {tokens[index][:40]!r}"
        )
    return tokens


def _strings(metadata: Mapping[str, Value], key: str) -> list[str]:
    value = metadata.get(KEY + key, Value("nothing", None))
    if value.kind != "string[]" or (key == "tokens" and not value.value):
        raise StorageError(f"{KEY}{key} is of the kind {value.kind}, expected a list of strings")
    wrong = next((index for index, text in enumerate(value.value) if not _encodable(text)), None)
    if wrong is not None:
        raise StorageError(f"{KEY}{key}: entry {wrong} is not UTF-8")
    return value.value


def _encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _numbers(metadata: Mapping[str, Value], key: str, kind: str, count: int) -> np.ndarray | None:
    value = metadata.get(KEY + key)
    if value is not None and (value.kind != kind or len(value.value) != count):
        raise StorageError(f"{KEY}{key} is of the kind {value.kind}, expected {kind} with {count} entries")
    return None if value is None else value.value


def _flag(metadata: Mapping[str, Value], key: str, default: bool) -> bool:
    value = metadata.get(KEY + key, Value("bool", default))
    if value.kind != "bool":
        raise StorageError(f"{KEY}{key} is of the kind {value.kind}, expected bool")
    return value.value


def _id(metadata: Mapping[str, Value], key: str, count: int, default: int | None) -> int | None:
    value = metadata.get(KEY + key)
    if value is None:
        return default if default is not None and default < count else None
    if value.kind not in ("u32", "i32", "u64", "i64") or not 0 <= value.value < count:
        raise StorageError(f"{KEY}{key} is {value}, expected an id from 0 to {count - 1}")
    return value.value


def _byte_level(metadata: Mapping[str, Value], vocabulary: dict[str, int]) -> dict[str, Any]:
    pre = PRE_TOKENIZERS[_pre(metadata)]
    merges = []
    for index, merge in enumerate(_strings(metadata, "merges")):
        cut = merge.find(" ", 1)  # a piece may be a space
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or any(piece not in vocabulary for piece in (left, right, left + right)):
            raise StorageError(
                f"{KEY}merges: entry {index}, {merge[:40]!r}, does not join two tokens to a third"
            )
        merges.append([left, right])
    return {
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=pre.ignore_merges),
    }


def _sentence_piece(
    metadata: Mapping[str, Value], vocabulary: dict[str, int], tokens: Sequence[str]
) -> dict[str, Any]:
    """As transformers converts such vocabularies: the scores order the merges, spaces are U+2581."""
    scores = _numbers(metadata, "scores", "f32[]", len(tokens))
    if scores is None:
        raise StorageError(f"{KEY}scores is missing, expected a score for each token of the model llama")
    unknown = _id(metadata, "unknown_token_id", len(tokens), 0)
    prefix = _flag(metadata, "add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    begin = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = _bpe(vocabulary, merges_of_scores(vocabulary, scores), ignore_merges=False)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": model | {"unk_token": tokens[unknown or 0], "fuse_unk": True, "byte_fallback": True},
    }


def merges_of_scores(vocabulary: Mapping[str, int], scores: np.ndarray) -> list[list[str]]:
    """Every way to join two tokens to a third; the joins of the token with the highest score come first."""
    merges = []
    for token, index in vocabulary.items():
        joins = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [join for join in joins if join[0] in vocabulary and join[1] in vocabulary]
        merges += [
            (index, join)
            for join in sorted(known, key=lambda join: (vocabulary[join[0]], vocabulary[join[1]]))
        ]
    merges.sort(key=lambda merge: (-float(scores[merge[0]]), -len(merge[1][0]), -len(merge[1][1])))
    return [list(join) for _, join in merges]


def _bpe(vocabulary: Mapping[str, int], merges: list[list[str]], *, ignore_merges: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary,
        "merges": merges,
    }
