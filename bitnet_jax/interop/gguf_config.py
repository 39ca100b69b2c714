"""Metadata of a GGUF file <-> ModelConfig.

A key that changes the computation and is not supported is refused by name, as is one that is not known: only INERT and
NEUTRAL are passed over. The architectures differ in the activation, the norms and the order of the rows of q and k:

| general.architecture | model | activation | sub norms | rows of q and k |
|---|---|---|---|---|
| bitnet-b1.58, bitnet-25 | BitNet b1.58 2B-4T | squared ReLU | yes | as in Hugging Face files |
| bitnet | BitNet b1.58 of 1bitLLM | SiLU | yes | as in Hugging Face files |
| llama | Llama, SmolLM; any biases | SiLU | no | pairs of a rotation side by side |
| qwen2 | Qwen2, with biases of q, k and v | SiLU | no | as in Hugging Face files |
| qwen3 | Qwen3, with norms of q and k | SiLU | no | as in Hugging Face files |

Biases and norms of q and k are there if the file has their tensors in its first layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bitnet_jax.interop.gguf_file import GgufFile, Value
from bitnet_jax.models import ModelConfig

NO_BIAS = ("none", False)  # ModelConfig.attention_bias and mlp_bias
BIASES = {
    "attention": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp": ("ffn_gate", "ffn_up", "ffn_down"),
}


class Family(NamedTuple):
    norm_placement: str
    mlp: str
    biases: tuple[tuple[str, bool], ...] = (
        NO_BIAS,
    )  # with which a model is written; it is read without any too
    qk_norm: bool = False
    always_tied: bool = False  # the graph of llama.cpp multiplies with the embedding, whatever the file holds
    paired_rows: bool = False  # llama.cpp rotates channels 2i, 2i + 1 of a head, this package i, i + h/2


FAMILIES = {
    "bitnet-b1.58": Family("sub", "relu2_glu", always_tied=True),
    "bitnet-25": Family("sub", "relu2_glu", always_tied=True),
    "bitnet": Family("sub", "silu_glu", always_tied=True),
    "qwen2": Family("pre", "silu_glu", biases=(("qkv", False),)),
    "llama": Family(
        "pre",
        "silu_glu",
        biases=tuple((attention, mlp) for attention in ("none", "qkv", "qkvo") for mlp in (False, True)),
        paired_rows=True,
    ),
    "qwen3": Family("pre", "silu_glu", qk_norm=True),
}

_READ = (  # after the name of the architecture
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
)
# Nothing of this package's computation depends on these.
INERT = ("rope.scaling.original_context_length", "attention.layer_norm_epsilon", "tensor_data_layout")
INERT_NAMESPACES = ("general.", "tokenizer.", "quantize.", "split.")
# Keys that change the computation -> the value with which they do not.
NEUTRAL: dict[str, object] = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
}

# Fields of ModelConfig that a file holds, and those on which the computation of a finished model does not depend. The
# others have no key: they must have their default values.
_WRITTEN = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size",
    "max_length", "rope_theta", "mlp", "norm_eps", "norm_placement", "tie_embeddings", "precision",
    "use_bias", "attention_bias", "mlp_bias", "qk_norm",
)  # fmt: skip
_FREE = (
    "trained_length", "dropout", "inside_norm_eps", "embedding_dtype", "init_std", "ternary_format",
    "dtype", "product", "remat", "sub_norm_warmup",
)  # fmt: skip


def read_config(file: GgufFile, dtype: str) -> tuple[ModelConfig, Family]:
    """The model that the metadata describe, with all layers in `dtype` and the head tied if there is no output.weight.

    Raises:
      ValueError: an unsupported architecture or key, a missing key, or a value out of range.
    """
    metadata = file.metadata
    name = _string(metadata, "general.architecture")
    if name not in FAMILIES:
        raise ValueError(f"general.architecture is {name!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if "split.count" in metadata and _integer(metadata, "split.count", lowest=0) > 1:
        raise ValueError(
            f"split.count is {metadata['split.count'].value}, expected a whole model; merge its files with "
            "llama-gguf-split --merge"
        )
    _check_keys(metadata, name)

    def integer(key: str, default: int | None = None) -> int:
        return _integer(metadata, f"{name}.{key}", default)

    layers, heads, width = (
        integer("block_count"),
        integer("attention.head_count"),
        integer("embedding_length"),
    )
    if layers > len(file.tensors):
        raise ValueError(
            f"{name}.block_count is {layers}, but the file holds only {len(file.tensors)} tensors"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError("there is no tensor token_embd.weight; expected a language model")
    vocabulary = file.tensors["token_embd.weight"].shape[0]
    head_dim = integer("attention.key_length", max(1, width // heads))
    for key, expected in {
        "vocab_size": vocabulary,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }.items():
        if (got := integer(key, expected)) != expected:
            raise ValueError(f"{name}.{key} is {got}, expected {expected}; such models are not supported")
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=integer("attention.head_count_kv", heads),
        head_dim=None if head_dim * heads == width else head_dim,
        ffn_size=integer("feed_forward_length"),
        max_length=integer("context_length"),
        rope_theta=_positive(metadata, f"{name}.rope.freq_base", 10_000.0),
        mlp=family.mlp,
        norm_eps=_positive(metadata, f"{name}.attention.layer_norm_rms_epsilon"),
        norm_placement=family.norm_placement,
        qk_norm=family.qk_norm and "blk.0.attn_q_norm.weight" in file.tensors,
        **_biases(file, family),
        tie_embeddings=family.always_tied or "output.weight" not in file.tensors,
        precision=dtype,
        dtype=dtype,
    )
    return config, family


def _biases(file: GgufFile, family: Family) -> dict[str, Any]:
    """The fields of ModelConfig for the biases in the first layer; those that the family lacks are left to the check of
    the tensors' names."""
    found = {
        part: [module for module in modules if f"blk.0.{module}.bias" in file.tensors]
        for part, modules in BIASES.items()
    }
    attention = "qkvo" if "attn_output" in found["attention"] else "qkv" if found["attention"] else "none"
    if (attention, bool(found["mlp"])) not in family.biases:
        return {}
    if (attention, bool(found["mlp"])) == ("qkvo", True):
        return {"use_bias": True}
    return {"attention_bias": attention, "mlp_bias": bool(found["mlp"])}


def _check_keys(metadata: Mapping[str, Value], architecture: str) -> None:
    for key, (_, value) in metadata.items():
        inside = key.removeprefix(f"{architecture}.")
        if inside == key:
            if key.startswith(INERT_NAMESPACES):
                continue
        elif inside in (*_READ, *INERT):
            continue
        elif inside in NEUTRAL and not isinstance(value, np.ndarray | list):
            if value == NEUTRAL[inside]:
                continue
            raise ValueError(
                f"{key} is {value!r}, expected {NEUTRAL[inside]!r}; such models are not supported"
            )
        raise ValueError(
            f"{key} is {str(value)[:40]!r}; this key may change the computation and is not supported"
        )


def family_of(config: ModelConfig) -> str:
    """The architecture under which a config can be written. Raises ValueError: none, naming the field."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in (*_WRITTEN, *_FREE) and value != field.default:
            raise ValueError(
                f"model.{field.name} is {value!r}, which GGUF files cannot hold; expected {field.default!r}"
            )
    biases = ("qkvo", True) if config.use_bias else (config.attention_bias, config.mlp_bias)
    of_shape = {
        name: family
        for name, family in FAMILIES.items()
        if (family.norm_placement, family.mlp) == (config.norm_placement, config.mlp)
    }
    for name, family in of_shape.items():
        if biases in family.biases and family.qk_norm == config.qk_norm:
            if family.always_tied and not config.tie_embeddings:
                raise ValueError(
                    f"model.tie_embeddings is False, but the architecture {name} has a tied head"
                )
            return name
    if of_shape:
        raise ValueError(
            f"got model.qk_norm={config.qk_norm} with biases of {'+'.join(config.biased) or 'no layer'}, which none of "
            f"the architectures {', '.join(of_shape)} has"
        )
    raise ValueError(
        f"got model.norm_placement={config.norm_placement!r} with model.mlp={config.mlp!r}, expected one of "
        + ", ".join(sorted({f"{family.norm_placement} with {family.mlp}" for family in FAMILIES.values()}))
    )


def metadata_of(config: ModelConfig, name: str) -> dict[str, Value]:
    """The keys of the architecture `name`, in the order of the published BitNet file."""
    keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_size,
        "rope.dimension_count": config.head_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.kv_heads,
    }
    if config.head_size * config.num_heads != config.hidden_size:
        keys |= {"attention.key_length": config.head_size, "attention.value_length": config.head_size}
    metadata = {f"{name}.{key}": Value("u32", value) for key, value in keys.items()}
    metadata[f"{name}.attention.layer_norm_rms_epsilon"] = Value("f32", config.norm_eps)
    metadata[f"{name}.rope.freq_base"] = Value("f32", config.rope_theta)
    return metadata


def _string(metadata: Mapping[str, Value], key: str) -> str:
    if key not in metadata or metadata[key].kind != "string":
        raise ValueError(f"{key} is {metadata.get(key)}, expected a string")
    return metadata[key].value


def _integer(metadata: Mapping[str, Value], key: str, default: int | None = None, lowest: int = 1) -> int:
    kind, value = metadata.get(key, (None, default))
    if (kind is not None and (kind[0] not in "ui" or kind.endswith("[]"))) or value is None:
        raise ValueError(f"{key} is {metadata.get(key)}, expected an integer; such models are not supported")
    if not lowest <= value < 2**31:
        raise ValueError(f"{key} is {value}, expected {lowest} to {2**31 - 1}")
    return value


def _positive(metadata: Mapping[str, Value], key: str, default: float | None = None) -> float:
    """A positive number; of a float32, the shortest decimal that rounds to it."""
    kind, value = metadata.get(key, (None, default))
    if (kind is not None and kind not in ("f32", "f64")) or value is None:
        raise ValueError(f"{key} is {metadata.get(key)}, expected a number")
    if not 0 < value < np.inf:
        raise ValueError(f"{key} is {value}, expected a positive number")
    return float(str(np.float32(value))) if kind == "f32" else float(value)
