"""A tiny encoder in the files of sentence-transformers, with weights from NumPy's generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.packed import tensor_file

CONFIG: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 40,
    "type_vocab_size": 2, "position_embedding_type": "absolute", "use_cache": True, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{stage}"}
    for i, (stage, path) in enumerate(
        (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    )
]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["a", "cat", "dog", "sat", "on", "the", "mat", "barks"]]
TOKENIZER = {
    "version": "1.0",
    "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    "padding": None,
    "added_tokens": [
        {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, word in enumerate(WORDS[:4])
    ],
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            word: {"id": word, "ids": [WORDS.index(word)], "tokens": [word]} for word in ("[CLS]", "[SEP]")
        },
    },
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "[UNK]"},
}  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    D, F = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], D),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], D),
        "embeddings.token_type_embeddings.weight": (2, D),
        "embeddings.LayerNorm.weight": (D,),
        "embeddings.LayerNorm.bias": (D,),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        linears = {f"attention.self.{name}": (D, D) for name in ("query", "key", "value")}
        linears |= {"attention.output.dense": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F)}
        for name, shape in linears.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{name}.{part}": (D,) for part in ("weight", "bias")}
    random = np.random.default_rng(0)
    values = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in sorted(shapes.items())}
    return {name: v + 1 if name.endswith("LayerNorm.weight") else v for name, v in values.items()}


def write(folder: Path, **changes: Any) -> Path:
    """The folder, with `changes` in place of the content of config, modules, pooling, tensors or longest."""
    content: dict[str, Any] = {
        "config": CONFIG,
        "modules": MODULES,
        "pooling": POOLING,
        "longest": 24,
    } | changes
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content["config"]))
    (folder / "modules.json").write_text(json.dumps(content["modules"]))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content["pooling"]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": content["longest"]}))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    with (folder / "model.safetensors").open("wb") as file:
        tensor_file.write(file, content.get("tensors") or tensors(), {}, aligned=False)
    return folder
