"""How text is split before byte-pair encoding, by the name in `tokenizer.ggml.pre`, as parts of a tokenizer.json.

The expressions are those of llama.cpp (src/llama-vocab.cpp), in the form of the models' own tokenizer.json where they
have one. Steps apply one after the other, each to the pieces that the previous ones leave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class PreTokenizer(NamedTuple):
    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False  # a piece that is a token is taken whole
    begins: bool = False  # llama.cpp adds the begin token unless add_bos_token says otherwise


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_LLAMA_BPE = PreTokenizer(_sequence(_split(_LLAMA3), _byte_level(False)), ignore_merges=True, begins=True)
_SMOLLM = PreTokenizer(_sequence({"type": "Digits", "individual_digits": True}, _byte_level(True)))
PRE_TOKENIZERS = {
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "gpt-2": PreTokenizer(_byte_level(True)),
    "qwen2": PreTokenizer(_sequence(_split(_QWEN2), _byte_level(False)), normalizer={"type": "NFC"}),
    "default": PreTokenizer(
        _sequence(
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(_GPT2),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _byte_level(False),
        )
    ),
}


def name_of(tokenizer: dict[str, Any]) -> str:
    """The name of the splitting of a parsed tokenizer.json. Raises ValueError: it has none."""
    found = (
        _plain(tokenizer.get("pre_tokenizer")),
        tokenizer.get("normalizer"),
        tokenizer["model"].get("ignore_merges", False),
    )
    for name, known in PRE_TOKENIZERS.items():
        if found == (_plain(known.pre_tokenizer), known.normalizer, known.ignore_merges):
            return name
    raise ValueError(
        f"tokenizer.json: got the pre-tokenizer, normalizer and ignore_merges {str(found)[:300]}, expected "
        f"those of one of {', '.join(PRE_TOKENIZERS)}, the names that GGUF files have for them"
    )


def _plain(step: Any) -> Any:
    """Without settings that do not change the pieces."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence":
        steps = [_plain(inner) for inner in step.get("pretokenizers", [])]
        return steps[0] if len(steps) == 1 else steps
    return {"use_regex": True, **{key: value for key, value in step.items() if key != "trim_offsets"}}
