"""config.json of a BitNet or Llama checkpoint -> ModelConfig, and how its projections are stored."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from bitnet_jax.models import ModelConfig
from bitnet_jax.names import check_name

# The defaults of the library's config classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bitnet": {
        "vocab_size": 128_256,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 30,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "hidden_act": "relu2",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 500_000.0,
    },
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
    },
}
_NORM_PLACEMENTS = {"bitnet": "sub", "llama": "pre"}
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
    model_type = content.get("model_type", "bitnet")
    check_name("config.json: model_type", model_type, _DEFAULTS)
    defaults = _DEFAULTS[model_type]

    def value(key: str) -> Any:
        return content.get(key, defaults.get(key))

    layers = _integer(value, "num_hidden_layers")
    if layers > tensor_count:
        raise ValueError(
            f"config.json: num_hidden_layers is {layers}, but the folder holds only {tensor_count} tensors"
        )
    for key in ("attention_bias", "mlp_bias"):
        if content.get(key, False):
            raise ValueError(
                f"config.json: {key} is {content[key]!r}; projections with a bias are not supported"
            )
    activation = value("hidden_act")
    check_name("config.json: hidden_act", activation, ACTIVATIONS)
    tied = value("tie_word_embeddings")
    if not isinstance(tied, bool):
        raise ValueError(f"config.json: tie_word_embeddings is {tied!r}, expected true or false")

    form = _form(content.get("quantization_config"))
    config = ModelConfig(
        vocab_size=_integer(value, "vocab_size"),
        hidden_size=_integer(value, "hidden_size"),
        num_layers=layers,
        num_heads=_integer(value, "num_attention_heads"),
        num_kv_heads=None if value("num_key_value_heads") is None else _integer(value, "num_key_value_heads"),
        head_dim=None if value("head_dim") is None else _integer(value, "head_dim"),
        ffn_size=_integer(value, "intermediate_size"),
        max_length=_integer(value, "max_position_embeddings"),
        rope_theta=_rope_theta(content, defaults["rope_theta"]),
        mlp=ACTIVATIONS[activation],
        norm_eps=_positive(value, "rms_norm_eps"),
        norm_placement=_NORM_PLACEMENTS[model_type],
        inside_norm=form.inside_norm,
        inside_norm_eps=form.inside_norm_eps,
        tie_embeddings=tied,
        precision=dtype,
        dtype=dtype,
    )
    if form.quantized:
        config = dataclasses.replace(config, precision=_rules(config, form))
    return config, form


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
                f"config.json: modules_to_not_convert holds {entry!r}, which library versions interpret "
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
        raise ValueError(f"config.json: quantization_config is {content!r}, expected an object or null")
    choices = {
        "quant_method": ("bitnet",),
        "linear_class": ("bitlinear", "autobitlinear"),
        "quantization_mode": ("offline", "online"),
    }
    known = (*choices, "use_rms_norm", "rms_norm_eps", "modules_to_not_convert")
    for key in content:
        if key not in known:
            raise ValueError(
                f"config.json: quantization_config.{key} is unknown, expected only {', '.join(known)}"
            )
    for key, allowed in choices.items():
        if content.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"config.json: quantization_config.{key} is {content[key]!r}, expected {' or '.join(allowed)}"
            )
    multiplies = content.get("linear_class", "bitlinear") == "autobitlinear"
    offline = content.get("quantization_mode", "offline") == "offline"
    if not multiplies and not offline:
        raise ValueError("config.json: linear_class bitlinear has no online mode; expected autobitlinear")
    inside_norm = content.get("use_rms_norm", False)
    if not isinstance(inside_norm, bool):
        raise ValueError(
            f"config.json: quantization_config.use_rms_norm is {inside_norm!r}, expected true or false"
        )
    entries = content.get("modules_to_not_convert")
    entries = [] if entries is None else entries
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
        raise ValueError(f"config.json: modules_to_not_convert is {entries!r}, expected a list of names")
    return Form(
        quantized=True,
        offline=offline,
        scale_multiplies=multiplies,
        not_converted=tuple(entries),
        inside_norm=inside_norm,
        inside_norm_eps=_positive({"rms_norm_eps": 1e-6, **content}.get, "rms_norm_eps"),
    )


def _rope_theta(content: dict[str, Any], default: float) -> float:
    """The rotary base: `rope_theta`, at the top level or inside `rope_parameters` (older: `rope_scaling`)."""
    found = {}
    if "rope_theta" in content:
        found["rope_theta"] = _positive(content.get, "rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        parameters = content.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise ValueError(f"config.json: {key} is {parameters!r}, expected an object or null")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        unknown = set(parameters) - {"rope_type", "type", "rope_theta"}
        if kind != "default" or unknown:
            raise ValueError(
                f'config.json: {key} is {parameters}, expected rope_type "default" with a rope_theta; '
                "scaled or partial rotary positions are not supported"
            )
        if "rope_theta" in parameters:
            found[key] = _positive(parameters.get, "rope_theta")
    if len(set(found.values())) > 1:
        raise ValueError(f"config.json: rope_theta is given more than once, with different values: {found}")
    return next(iter(found.values()), default)


def _integer(value: Any, key: str) -> int:
    number = value(key)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**31:
        raise ValueError(f"config.json: {key} is {number!r}, expected a positive integer")
    return number


def _positive(value: Any, key: str) -> float:
    number = value(key)
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ValueError(f"config.json: {key} is {number!r}, expected a positive number")
    return float(number)
