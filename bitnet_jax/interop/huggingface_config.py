"""config.json of a Hugging Face checkpoint -> ModelConfig, and how its projections are stored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from bitnet_jax.interop.huggingface_families import Family, family_of
from bitnet_jax.interop.huggingface_rope import read_rope
from bitnet_jax.interop.json_values import boolean, integer, positive, shown
from bitnet_jax.models import ModelConfig
from bitnet_jax.names import check_name

ACTIVATIONS = {"relu2": "relu2_glu", "silu": "silu_glu"}


@dataclasses.dataclass(frozen=True)
class Form:
    """How projections are stored and computed; see the table in `huggingface`."""

    quantized: bool = False
    offline: bool = False
    scale_multiplies: bool = True  # False: the output is divided by weight_scale
    not_converted: tuple[str, ...] = ()  # names of modules that stay float
    inside_norm: bool = False
    inside_norm_eps: float = 1e-6


def read_config(content: dict[str, Any], tensor_count: int, dtype: str) -> tuple[ModelConfig, Form]:
    """The model described by config.json.

    Args:
      content: the parsed config.json.
      tensor_count: tensors in the folder, an upper bound on the number of layers.
      dtype: compute dtype.

    Raises:
      ValueError: an unsupported model, or values out of range.
    """
    family = family_of(content)

    def value(key: str) -> Any:
        return content.get(key, family.defaults.get(key))

    layers = integer(value, "num_hidden_layers")
    if layers > tensor_count:
        raise ValueError(
            f"config.json: num_hidden_layers is {layers}, but the folder holds only {tensor_count} tensors"
        )
    activation = value("hidden_act")
    check_name("config.json: hidden_act", activation, ACTIVATIONS)
    max_length = integer(value, "max_position_embeddings")
    no_rope = _no_rope_layers(value, layers)
    theta, scaling = read_rope(content, family.defaults["rope_theta"], max_length)
    form = _form(content.get("quantization_config"))
    config = ModelConfig(
        vocab_size=integer(value, "vocab_size"),
        hidden_size=integer(value, "hidden_size"),
        num_layers=layers,
        num_heads=integer(value, "num_attention_heads"),
        num_kv_heads=None if value("num_key_value_heads") is None else integer(value, "num_key_value_heads"),
        head_dim=None if value("head_dim") is None else integer(value, "head_dim"),
        ffn_size=integer(value, "intermediate_size"),
        max_length=max_length,
        rope_theta=theta,
        rope_scaling=scaling,
        mlp=ACTIVATIONS[activation],
        norm_eps=positive(value, "rms_norm_eps"),
        norm_placement=family.norm_placement,
        qk_norm=family.qk_norm,
        no_rope_layers=no_rope,
        sliding_window=_sliding_window(value, family, layers, no_rope),
        **_biases(value, family),
        inside_norm=form.inside_norm,
        inside_norm_eps=form.inside_norm_eps,
        tie_embeddings=boolean(value, "tie_word_embeddings"),
        precision=dtype,
        dtype=dtype,
    )
    if form.quantized:
        config = dataclasses.replace(config, precision=_rules(config, form))
    return config, form


def _biases(value: Callable[[str], Any], family: Family) -> dict[str, Any]:
    """The fields of ModelConfig for the biases of the projections."""
    attention, mlp = (
        key in family.defaults and boolean(value, key) for key in ("attention_bias", "mlp_bias")
    )
    if attention and mlp:
        return {"use_bias": True}
    return {"attention_bias": "qkv" if family.qkv_bias else "qkvo" if attention else "none", "mlp_bias": mlp}


def _no_rope_layers(value: Callable[[str], Any], layers: int) -> tuple[int, ...]:
    """Indices of the layers without rotary positions: zeros of `no_rope_layers`, or every n-th layer."""
    flags, interval = value("no_rope_layers"), value("no_rope_layer_interval")
    if flags is None:
        if interval is None:
            return ()
        interval = integer(value, "no_rope_layer_interval")
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(flags, list) or len(flags) < layers or any(flag not in (0, 1) for flag in flags):
        raise ValueError(
            f"config.json: no_rope_layers is {str(flags)[:60]}, expected a list of 0 (none) and 1 (rotary), "
            "one per layer"
        )
    return tuple(i for i in range(layers) if not flags[i])


def _sliding_window(
    value: Callable[[str], Any], family: Family, layers: int, no_rope: tuple[int, ...]
) -> int | None:
    """The window of all layers, or None."""
    if value("sliding_window") is None or (
        "use_sliding_window" in family.defaults and not boolean(value, "use_sliding_window")
    ):
        types = value("layer_types")
        if types is not None and types != ["full_attention"] * layers:
            raise ValueError(
                f"config.json: layer_types is {str(types)[:60]} without a sliding window, expected full_attention "
                "in every layer"
            )
        return None
    window = integer(value, "sliding_window")
    if "layer_types" not in family.defaults:
        return window
    types = value("layer_types")
    if types is None:
        # Defaults of the library: the layers from max_window_layers on; in smollm3 those without rotary positions.
        first = value("max_window_layers")
        if first is not None and (type(first) is not int or first < 0):
            raise ValueError(
                f"config.json: max_window_layers is {shown(first)}, expected 0 or a positive integer"
            )
        windowed = [i in no_rope if first is None else i >= first for i in range(layers)]
        types = ["sliding_attention" if slides else "full_attention" for slides in windowed]
    if types == ["full_attention"] * layers:
        return None
    if types != ["sliding_attention"] * layers:
        raise ValueError(
            f"config.json: layer_types is {str(types)[:80]} with sliding_window {window}; only models with a sliding "
            "window in every layer or in none are supported"
        )
    return window


def module_name(path: str) -> str:
    """Path of a linear layer -> its Hugging Face module, e.g. model.layers.0.self_attn.q_proj."""
    return path.replace("layers_", "model.layers.").replace("attention/", "self_attn/").replace("/", ".")


def _rules(config: ModelConfig, form: Form) -> str | tuple[tuple[str, str], ...]:
    """Ternary projections with int8 activations; the head and unconverted modules stay float."""
    names = {path: module_name(path) for path in config.linear_shapes() if path != "lm_head"}
    floats: set[str] = set()
    for entry in form.not_converted:
        # The library tests "starts with, matches as a regular expression, or ends with"; older versions tested
        # for a substring. Only entries on which all of these agree are accepted.
        matched = {p for p, name in names.items() if name.startswith(entry) or name.endswith(entry)}
        anywhere = {p for p, name in names.items() if entry in name}
        if re.search(r"[^\w.]", entry) or matched != anywhere:
            raise ValueError(
                f"config.json: modules_to_not_convert holds {shown(entry)}, which library versions interpret "
                "differently; write full module names, such as model.layers.0.mlp.down_proj"
            )
        floats |= matched
    if not floats:
        return "bitnet_b158"
    if form.inside_norm:
        raise ValueError("config.json: use_rms_norm with modules_to_not_convert is not supported")
    rules = tuple((path, config.dtype) for path in names if path in floats)
    return (*rules, ("*", "bitnet_b158")) if len(rules) < len(names) else rules


def _form(content: Any) -> Form:
    """The parsed quantization_config, with the library's defaults."""
    if content is None:
        return Form()
    if not isinstance(content, dict):
        raise ValueError(f"config.json: quantization_config is {shown(content)}, expected an object or null")
    choices = {
        "quant_method": ("bitnet",),
        "linear_class": ("bitlinear", "autobitlinear"),
        "quantization_mode": ("offline", "online"),
    }
    known = (*choices, "use_rms_norm", "rms_norm_eps", "modules_to_not_convert")
    for key in content:
        if key not in known:
            raise ValueError(
                f"config.json: quantization_config.{key[:80]} is unknown, expected only {', '.join(known)}"
            )
    for key, allowed in choices.items():
        if content.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"config.json: quantization_config.{key} is {shown(content[key])}, expected {' or '.join(allowed)}"
            )
    multiplies = content.get("linear_class", "bitlinear") == "autobitlinear"
    offline = content.get("quantization_mode", "offline") == "offline"
    if not multiplies and not offline:
        raise ValueError("config.json: linear_class bitlinear has no online mode; expected autobitlinear")
    inside_norm = content.get("use_rms_norm", False)
    if not isinstance(inside_norm, bool):
        raise ValueError(
            f"config.json: quantization_config.use_rms_norm is {shown(inside_norm)}, expected true or false"
        )
    entries = content.get("modules_to_not_convert")
    entries = [] if entries is None else entries
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
        raise ValueError(f"config.json: modules_to_not_convert is {shown(entries)}, expected a list of names")
    return Form(
        quantized=True,
        offline=offline,
        scale_multiplies=multiplies,
        not_converted=tuple(entries),
        inside_norm=inside_norm,
        inside_norm_eps=positive({"rms_norm_eps": 1e-6, **content}.get, "rms_norm_eps"),
    )
