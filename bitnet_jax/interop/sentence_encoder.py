"""Sentence encoders of the BERT family, as sentence-transformers stores them -> (ModelConfig, variables, conversation).

    modules.json             the stages: Transformer, Pooling, Normalize
    config.json              the Transformer: model_type bert
    1_Pooling/config.json    how hidden states become one vector
    sentence_bert_config.json   max_seq_length

Texts are single sequences, so all tokens have type 0, whose embedding is added to those of the positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.files import decode, parse_json, read_file
from bitnet_jax.interop.huggingface_conversation import written_around
from bitnet_jax.interop.json_values import integer, positive, shown
from bitnet_jax.interop.safetensors_folder import float32, open_tensors, read_json
from bitnet_jax.models import ModelConfig
from bitnet_jax.names import check_name, unmatched

MODULES = "modules.json"
STAGES = ("Transformer", "Pooling", "Normalize")
MEAN = "pooling_mode_mean_tokens"
_JSON_BYTES = 1 << 20

# Keys of config.json that are read, those the vectors do not depend on, and those with the one value that is supported.
READ = {
    "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "type_vocab_size", "vocab_size",
}  # fmt: skip
INERT = {
    "_attn_implementation", "_name_or_path", "architectures", "attention_probs_dropout_prob", "bos_token_id",
    "classifier_dropout", "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing", "hidden_dropout_prob",
    "id2label", "initializer_range", "label2id", "model_type", "pad_token_id", "problem_type", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
NEUTRAL: dict[str, Any] = {"position_embedding_type": "absolute"}
ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
# Ours -> theirs, below layers_i and encoder.layer.i.
LINEARS = {
    "attention/q_proj": "attention.self.query",
    "attention/k_proj": "attention.self.key",
    "attention/v_proj": "attention.self.value",
    "attention/o_proj": "attention.output.dense",
    "mlp/up_proj": "intermediate.dense",
    "mlp/down_proj": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
UNUSED = ("pooler.", "embeddings.position_ids")  # beginnings of tensors that the vectors do not depend on


def recognizes(folder: Path) -> bool:
    return (folder / MODULES).is_file()


def load(folder: Path) -> tuple[ModelConfig, dict[str, Any], Conversation]:
    """Reads a folder of sentence-transformers.

    Returns: the config; `{"params": ...}` for `Transformer(config).apply`, whose output is unit vectors; and the tokens
    that its tokenizer writes before and after every text.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: damaged files, or stages, pooling or a model_type other than those above.
    """
    _check_stages(folder)
    content = read_json(folder / "config.json")
    tensors = open_tensors(folder)
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    config = _config(content, _longest(folder), len(tensors))
    names = tensor_names(config)
    types = "embeddings.token_type_embeddings.weight"
    found = {name.removeprefix(prefix) for name in tensors}
    used = {name for name in found if not name.startswith(UNUSED)}
    if differ := unmatched({name for name, _ in names.values()} | {types}, used):
        raise ValueError(f"{folder}: the tensors do not match config.json: {differ}; check num_hidden_layers")
    shapes = dict(names.values()) | {types: (integer(content.get, "type_vocab_size"), config.hidden_size)}
    values = {}
    for name, shape in shapes.items():
        try:
            values[name] = float32(tensors[prefix + name], shape)
        except ValueError as error:
            raise ValueError(f"{folder}: {name}: {error}") from error
    values[names["position_embed/embedding"][0]] += values[types][:1]
    params = {tuple(path.split("/")): jnp.asarray(values[name]) for path, (name, _) in names.items()}
    before, after = written_around(folder, config.vocab_size)
    conversation = Conversation(begin=before or (), end=after)
    return config, {"params": unflatten_dict(params)}, conversation


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter path -> (tensor name, shape), without the embeddings of token types."""
    D = config.hidden_size

    def norm(ours: str, theirs: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {f"{ours}/scale": (f"{theirs}.weight", (D,)), f"{ours}/bias": (f"{theirs}.bias", (D,))}

    names = {
        "embed/embedding": ("embeddings.word_embeddings.weight", (config.vocab_size, D)),
        "position_embed/embedding": ("embeddings.position_embeddings.weight", (config.max_length, D)),
        **norm("embed_norm", "embeddings.LayerNorm"),
    }
    for i in range(config.num_layers):
        for name, theirs in NORMS.items():
            names |= norm(f"layers_{i}/{name}", f"encoder.layer.{i}.{theirs}")
    for path, (n, k) in config.linear_shapes().items():
        layer, _, name = path.partition("/")
        module = f"encoder.layer.{layer.removeprefix('layers_')}.{LINEARS[name]}"
        names |= {f"{path}/weight": (f"{module}.weight", (n, k)), f"{path}/bias": (f"{module}.bias", (n,))}
    return names


def _config(content: dict[str, Any], longest: int | None, tensor_count: int) -> ModelConfig:
    check_name("config.json: model_type", content.get("model_type"), ("bert",))
    for key, value in content.items():
        off = value is None or value is False or value in ({}, [])
        if key not in READ | INERT and not off and NEUTRAL.get(key) != value:
            raise ValueError(
                f"config.json: {key[:80]} is {shown(value)}, which may change the vectors and is not supported here; "
                "remove it if it has no effect"
            )
    value = content.get
    layers, length = integer(value, "num_hidden_layers"), integer(value, "max_position_embeddings")
    if layers > tensor_count:
        raise ValueError(
            f"config.json: num_hidden_layers is {layers}, but there are only {tensor_count} tensors"
        )
    activation = str(value("hidden_act"))
    check_name("config.json: hidden_act", activation, ACTIVATIONS)
    return ModelConfig(
        vocab_size=integer(value, "vocab_size"),
        hidden_size=integer(value, "hidden_size"),
        num_layers=layers,
        num_heads=integer(value, "num_attention_heads"),
        ffn_size=integer(value, "intermediate_size"),
        max_length=length,
        trained_length=min(longest or length, length),
        causal=False,
        pooling="mean",
        position="learned",
        mlp=ACTIVATIONS[activation],
        use_bias=True,
        norm="layernorm",
        norm_bias=True,
        norm_eps=positive(value, "layer_norm_eps"),
        norm_placement="post",
        precision="float32",
    )


def _json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a complete folder of sentence-transformers")
    return parse_json(decode(read_file(path, _JSON_BYTES), path.name), path.name, "a complete file")


def _check_stages(folder: Path) -> None:
    """Raises ValueError: stages other than a mean of hidden states, scaled to length 1."""
    modules = _json(folder / MODULES)
    entries = modules if isinstance(modules, list) else []
    types = [str(one.get("type")) if isinstance(one, dict) else "" for one in entries]
    stages = tuple(name.rpartition(".")[2] for name in types)
    if stages != STAGES or not all(name.startswith("sentence_transformers.") for name in types):
        raise ValueError(f"{MODULES}: got the stages {', '.join(types)[:200]}, expected {', '.join(STAGES)}")
    place = entries[1].get("path")
    if not isinstance(place, str) or Path(place).name != place:
        raise ValueError(f"{MODULES}: got the path {shown(place)} of Pooling, expected the name of a folder")
    pooling = _json(folder / place / "config.json")
    modes = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    if modes != [MEAN]:
        raise ValueError(f"{place}/config.json: got the modes {', '.join(modes) or 'none'}, expected {MEAN}")


def _longest(folder: Path) -> int | None:
    """The number of tokens to which texts are cut, begin and end included; None: it is not stated."""
    path = folder / "sentence_bert_config.json"
    if not path.is_file() or _json(path).get("max_seq_length") is None:
        return None
    return integer(_json(path).get, "max_seq_length")
