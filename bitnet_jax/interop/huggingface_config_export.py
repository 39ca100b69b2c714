"""ModelConfig -> config.json of a Hugging Face model; everything that it cannot express is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from bitnet_jax.interop.huggingface_config import ACTIVATIONS, Form, module_name, read_config
from bitnet_jax.interop.huggingface_families import FAMILIES
from bitnet_jax.interop.huggingface_rope import rope_json
from bitnet_jax.models import ModelConfig, text_config
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES

# The forms of `huggingface_export.save`, as the reader describes them.
FORMS: dict[str, Form] = {
    "plain": Form(),
    "online": Form(quantized=True),
    "packed": Form(quantized=True, offline=True),
    "unpacked": Form(quantized=True, offline=True),
    "bitlinear": Form(quantized=True, offline=True, scale_multiplies=False),
}
# Fields of ModelConfig that config.json does not hold, because the outputs of the exported model do not depend on
# them. Precisions are compared separately, and `embedding_dtype` is the dtype of the stored tables.
NOT_STORED = {
    "dropout", "dtype", "embedding_dtype", "init_std", "precision", "product", "remat",
    "sub_norm_warmup", "ternary_format", "trained_length",
}  # fmt: skip
# Fields with a default that depends on other fields -> the property with the resolved value.
RESOLVED = {
    "num_kv_heads": "kv_heads", "head_dim": "head_size", "attention_scale": "score_scale",
    "use_bias": "biased", "attention_bias": "biased", "mlp_bias": "biased",
}  # fmt: skip
# What a Precision computes from given weights; its other fields only affect training.
COMPUTED = (
    "weight", "activation", "scale", "granularity", "activation_scale", "activation_shift", "hadamard", "top_k",
    "weight_options", "activation_options",
)  # fmt: skip


def config_json(config: ModelConfig, form: str, dtype: str) -> dict[str, Any]:
    """The content of config.json. Reading it gives a config with the same outputs, which is checked.

    Args:
      form: see `huggingface_export.save`.
      dtype: "float32" or "bfloat16", in which transformers then computes.

    Raises:
      ValueError: the form cannot hold the model; the message names the field or the layer.
    """
    config = text_config(config)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    floats = _float_projections(config, form)
    if form in ("packed", "bitlinear"):
        for path, (n, _) in config.linear_shapes().items():
            if n % 4 and path != "lm_head" and path not in floats:
                raise ValueError(
                    f"{path} has {n} outputs, expected a multiple of 4 for form {form!r}: four rows share a byte"
                )
    ternary_with_bias = [
        p for p in config.linear_shapes() if p not in floats and p.rpartition("/")[2] in config.biased
    ]
    if form in ("packed", "unpacked") and ternary_with_bias:
        raise ValueError(
            f"{ternary_with_bias[0]} has a bias, which the library multiplies by weight_scale in form {form!r}; "
            "use form 'bitlinear' or 'online'"
        )
    content = _content(config) | {"torch_dtype": dtype}
    if form != "plain":
        stored = FORMS[form]
        content["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear" if stored.scale_multiplies else "bitlinear",
            "quantization_mode": "offline" if stored.offline else "online",
            "use_rms_norm": config.inside_norm,
            "rms_norm_eps": config.inside_norm_eps,
            # An explicit list replaces the default of the library, which is the head.
            "modules_to_not_convert": [*map(module_name, floats), "lm_head"] if floats else None,
        }
    _check_reads_back(config, content, form)
    return content


def _float_projections(config: ModelConfig, form: str) -> list[str]:
    """Paths of the projections of the blocks that stay float; the others are ternary with int8 activations."""
    ternary, plain = RECIPES["bitnet_b158"], RECIPES["float32"]
    assert isinstance(ternary, Precision)
    assert isinstance(plain, Precision)
    floats = []
    precisions = config.precisions()
    for path, precision in precisions.items():
        if _computes(precision, plain):
            if path != "lm_head":
                floats.append(path)
        elif form == "plain" or path == "lm_head" or not _computes(precision, ternary):
            expected = (
                "a float recipe" if form == "plain" or path == "lm_head" else "bitnet_b158 or a float recipe"
            )
            raise ValueError(
                f"{path} has weight={precision.weight!r}, activation={precision.activation!r} "
                f"({_difference(precision, plain if form == 'plain' else ternary)}); "
                f"form {form!r} holds only {expected} there"
            )
    if form != "plain" and len(floats) == len([path for path in precisions if path != "lm_head"]):
        raise ValueError(
            f"form {form!r} needs ternary projections, but all of them are float; use form 'plain'"
        )
    return floats if form != "plain" else []


def _computes(precision: Precision, recipe: Precision) -> bool:
    return all(getattr(precision, name) == getattr(recipe, name) for name in COMPUTED)


def _difference(precision: Precision, recipe: Precision) -> str:
    names = [name for name in COMPUTED if getattr(precision, name) != getattr(recipe, name)]
    return ", ".join(f"{name}={getattr(precision, name)!r}" for name in names)


def _content(config: ModelConfig) -> dict[str, Any]:
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if config.mlp not in activations:
        raise ValueError(
            f"model.mlp={config.mlp!r} has no Hugging Face form; expected {', '.join(activations)}"
        )
    if config.norm_placement not in ("sub", "pre"):
        raise ValueError(
            f"model.norm_placement={config.norm_placement!r} has no Hugging Face form; expected sub or pre"
        )
    sub = config.norm_placement == "sub"
    attended = config.num_heads * config.head_size
    if sub and attended != config.hidden_size:
        raise ValueError(
            f"model.head_dim={config.head_size} with {config.num_heads} heads has no form with sub norms: "
            f"transformers expects hidden_size={config.hidden_size} values in attn_sub_norm, got {attended}"
        )
    model_type = _model_type(config)
    family = FAMILIES[model_type]
    content = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": activations[config.mlp],
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        **rope_json(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        # Absent keys would mean the ids of the published models.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.head_dim is not None:
        content["head_dim"] = config.head_dim
    slides = config.sliding_window is not None
    optional = {
        "attention_bias": "o_proj" in config.biased,
        "mlp_bias": "down_proj" in config.biased,
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0 if slides else config.num_layers,
        "layer_types": ["sliding_attention" if slides else "full_attention"] * config.num_layers,
        "no_rope_layers": [int(i not in config.no_rope_layers) for i in range(config.num_layers)],
    }
    return content | {key: value for key, value in optional.items() if key in family.defaults}


def _model_type(config: ModelConfig) -> str:
    """The family whose code has the features of the model; `_check_reads_back` finds combinations that none has."""
    if config.norm_placement == "sub":
        return "bitnet"
    if config.qk_norm:
        return "qwen3"
    if config.no_rope_layers:
        return "smollm3"
    if config.biased == ("q_proj", "k_proj", "v_proj"):
        return "qwen2"
    if config.sliding_window is not None:
        return "smollm3" if config.biased else "mistral"
    return "llama"


def _check_reads_back(config: ModelConfig, content: dict[str, Any], form: str) -> None:
    # Any bound on the layers will do: they come from the model, not from a file.
    again, _ = read_config(content, config.num_layers, config.dtype)
    for field in dataclasses.fields(config):
        name = RESOLVED.get(field.name, field.name)
        if field.name not in NOT_STORED and getattr(config, name) != getattr(again, name):
            raise ValueError(
                f"form {form!r} cannot hold model.{field.name}={getattr(config, field.name)!r}; "
                f"it reads back as {getattr(again, name)!r}"
            )
