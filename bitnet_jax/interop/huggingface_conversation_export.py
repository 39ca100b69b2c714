"""The files of a Hugging Face folder that state its tokenizer, begin and end tokens, and chat template.

`huggingface_conversation.read` reads the same values from them, and transformers obeys them: generation stops at
eos_token_id of generation_config.json, and the post-processor of tokenizer.json writes the begin tokens.
"""

from __future__ import annotations

import json
from typing import Any

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.tokenizers import JsonTokenizer, Tokenizer
from bitnet_jax.interop.huggingface_conversation import (
    GENERATION,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
)


def files_of(tokenizer: Tokenizer | None, conversation: Conversation) -> dict[str, str]:
    """File name -> its text, for a folder beside config.json and the weights.

    Begin tokens of a model trained here, which precede documents but not prompts, are left out: a tokenizer in this
    format has no such distinction.

    Raises:
      ValueError: a tokenizer that tokenizer.json cannot hold, or begin tokens without a tokenizer to write them.
    """
    files: dict[str, str] = {}
    ends: Any = list(conversation.end)
    generation = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    begin = conversation.begin if conversation.begins_prompts else ()
    if tokenizer is None:
        if begin:
            raise ValueError(
                f"got begin tokens {list(begin)} without a tokenizer, expected one to write them"
            )
    else:
        if not isinstance(tokenizer, JsonTokenizer):
            raise ValueError(
                f"a {tokenizer.kind} tokenizer has no Hugging Face form; expected one read from tokenizer.json, or None"
            )
        content = json.loads(tokenizer.to_json())
        content["post_processor"] = _with_begin(content, begin)
        files[TOKENIZER] = json.dumps(content, ensure_ascii=False)
        settings = dict(conversation.special_tokens) | {"add_bos_token": bool(begin)}
        files[TOKENIZER_CONFIG] = json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast"} | settings, indent=2
        )
    if len(begin) == 1:
        generation["bos_token_id"] = begin[0]
    if generation:
        files[GENERATION] = json.dumps(generation, indent=2) + "\n"
    if conversation.template is not None:
        files[TEMPLATE] = conversation.template
    return files


def _with_begin(content: dict[str, Any], begin: tuple[int, ...]) -> Any:
    """The post-processor of a tokenizer.json, with begin tokens before a single text and each of a pair."""
    old = content.get("post_processor")
    kept = [one for one in _several(old) if one["type"] == "ByteLevel"]  # which changes offsets only
    if not begin:
        return old if kept == _several(old) else (kept[0] if kept else None)
    texts = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, dict):
        texts |= {index: text for text, index in vocabulary.items() if index in begin}
    for index in begin:
        if index not in texts:
            raise ValueError(f"got the begin token {index}, expected an id of the tokenizer")
    special = [{"SpecialToken": {"id": texts[index], "type_id": 0}} for index in begin]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    template = {
        "type": "TemplateProcessing",
        "single": [*special, text],
        "pair": [*special, text, *special, other],
        "special_tokens": {
            texts[index]: {"id": texts[index], "ids": [index], "tokens": [texts[index]]} for index in begin
        },
    }
    return template if not kept else {"type": "Sequence", "processors": [*kept, template]}


def _several(processor: Any) -> list[Any]:
    if processor is None:
        return []
    return processor["processors"] if processor["type"] == "Sequence" else [processor]
