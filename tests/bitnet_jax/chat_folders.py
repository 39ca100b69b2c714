"""A tiny Hugging Face folder whose model answers every message with a fixed text, then an end token.

The layer adds nothing, the embedding is the identity and the head a permutation, so each token has one successor:
after the header of an answer follows `ANSWER`, then <|im_end|>; after "?" follows <|stop|>. After these two follow x
and y, which no text must show.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bitnet_jax.interop.huggingface import tensor_names
from bitnet_jax.interop.huggingface_config import read_config

SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "<|stop|>", "</s>")
BEGIN, START, END, STOP, UNUSED_END = range(256, 261)
ANSWER = "Hé 🙂!"
TEMPLATE = """\
{%- if messages[0].role != 'system' %}
<|im_start|>system
Be brief.<|im_end|>
{% endif %}
{%- for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
SIZE = 264  # vocabulary and width


def tokenizer_json(**changes: Any) -> str:
    """Byte-level BPE of the 256 bytes, id = byte, and SPECIAL."""
    pytest.importorskip("tokenizers", reason="the tokenizers library is an extra")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    letters = bytes_to_letters()
    library = Library(models.BPE(vocab={letters[i]: i for i in range(256)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(SPECIAL))
    return json.dumps(json.loads(library.to_str()) | changes)


def bytes_to_letters() -> list[str]:
    """The byte-level alphabet: printable Latin-1 characters stand for themselves, the others follow from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(i if i in printable else next(others)) for i in range(256)]


def adds(*ids: int, after: tuple[int, ...] = ()) -> dict[str, Any]:
    """A post-processor of tokenizer.json that writes these special tokens before, and after, a text."""

    def piece(i: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": SPECIAL[i - 256], "type_id": 0}}

    text = {"Sequence": {"id": "A", "type_id": 0}}
    table = {
        SPECIAL[i - 256]: {"id": SPECIAL[i - 256], "ids": [i], "tokens": [SPECIAL[i - 256]]}
        for i in (*ids, *after)
    }
    single = [*map(piece, ids), text, *map(piece, after)]
    return {"type": "TemplateProcessing", "single": single, "pair": [text, text], "special_tokens": table}


CONFIG = {
    "model_type": "llama", "vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "eos_token_id": UNUSED_END,
}  # fmt: skip


def write_folder(folder: Path, files: dict[str, Any] | None = None, **tokenizer: Any) -> Path:
    """The folder, with two end tokens and a template in it.

    Args:
      files: name -> text, or an object as JSON; None removes the file. In place of the usual ones.
      tokenizer: fields of tokenizer.json.
    """
    folder.mkdir()
    successors = dict(enumerate(range(SIZE))) | {ord("?"): STOP, END: ord("x"), STOP: ord("y")}
    successors |= dict(pairwise(b"\n" + ANSWER.encode())) | {ord(ANSWER[-1]): END}
    config, _ = read_config(CONFIG, 100, "float32")
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_names(config).values()}
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name] += 1
    tensors["model.embed_tokens.weight"] = np.eye(SIZE, dtype=np.float32)
    for token, successor in successors.items():
        tensors["lm_head.weight"][successor, token] += 1 if token == successor else 2
    save_file(tensors, folder / "model.safetensors")
    usual = {
        "config.json": CONFIG,
        "generation_config.json": {"eos_token_id": [END, STOP]},
        "tokenizer.json": tokenizer_json(**tokenizer),
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": TEMPLATE},
    }
    for name, content in (usual | (files or {})).items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder
