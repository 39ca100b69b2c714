"""Rotary settings of config.json <-> rope_theta and RopeScaling.

Libraries up to version 4 write `rope_theta` and `rope_scaling`, later ones `rope_parameters` with both.
"""

from __future__ import annotations

import math
from typing import Any

from bitnet_jax.interop.json_values import positive, shown
from bitnet_jax.nn.rope_scaling import KINDS, RopeScaling

# Keys of the file -> fields of RopeScaling.
_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
}
_OF_KIND = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
    ),
}  # fmt: skip
_REQUIRED = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def read_rope(
    content: dict[str, Any], default_theta: float, max_length: int
) -> tuple[float, RopeScaling | None]:
    """The rotary base and the scaling of the frequencies.

    Args:
      content: the parsed config.json.
      default_theta: of the model type, if the file has none.
      max_length: the library's default of original_max_position_embeddings.

    Raises:
      ValueError: an unsupported kind, unknown keys, values out of range, or two different settings.
    """
    thetas, scalings = {}, {}
    if "rope_theta" in content:
        thetas["rope_theta"] = positive(content.get, "rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        parameters = content.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise ValueError(f"config.json: {key} is {shown(parameters)}, expected an object or null")
        if "rope_theta" in parameters:
            thetas[key] = positive(parameters.get, "rope_theta")
        scalings[key] = _scaling(key, parameters, max_length)
    for name, found in (("rope_theta", thetas), ("the scaling", scalings)):
        if len(set(found.values())) > 1:
            raise ValueError(f"config.json: {name} is given more than once, with different values: {found}")
    return next(iter(thetas.values()), default_theta), next(iter(scalings.values()), None)


def _scaling(key: str, parameters: dict[str, Any], max_length: int) -> RopeScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    given = {
        name: value
        for name, value in parameters.items()
        if name not in ("rope_type", "type", "rope_theta") and value is not None
    }
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    if kind not in ("default", *KINDS):
        raise ValueError(
            f"config.json: {key}.rope_type is {shown(kind)}, expected one of default, {', '.join(KINDS)}; other "
            "scalings of rotary positions are not supported"
        )
    mscales = [given.pop(name, None) for name in ("mscale", "mscale_all_dim")] if kind == "yarn" else []
    known = _OF_KIND.get(kind, ())
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"config.json: {key}.{unknown[0]} is {shown(given[unknown[0]])}, which is not supported with rope_type "
            f"{shown(kind)}; expected only {', '.join(('rope_type', 'rope_theta', *known))}"
        )
    if kind == "default":
        return None
    if "original_max_position_embeddings" in known:
        given.setdefault("original_max_position_embeddings", max_length)
    if kind == "yarn" and "factor" not in given:
        given["factor"] = max_length / positive(given.get, "original_max_position_embeddings")
    missing = [name for name in _REQUIRED.get(kind, ("factor",)) if name not in given]
    if missing:
        raise ValueError(f"config.json: {key} has no {missing[0]}, which rope_type {shown(kind)} needs")
    if kind == "yarn":  # the library treats 0 like an absent value
        given = {
            name: value for name, value in given.items() if value or name not in ("beta_fast", "beta_slow")
        }
        if "attention_factor" not in given and all(mscales):
            factor, (numerator, denominator) = positive(given.get, "factor"), mscales
            scales = {"mscale": numerator, "mscale_all_dim": denominator}
            above, below = (0.1 * positive(scales.get, name) * math.log(factor) + 1 for name in scales)
            given["attention_factor"] = above / below if factor > 1 else 1.0
    try:
        return RopeScaling(kind=kind, **{_FIELDS[name]: value for name, value in given.items()})
    except ValueError as error:
        raise ValueError(f"config.json: {key}: {error}") from error


def rope_json(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys of config.json, in the spelling that every version reads."""
    if scaling is None:
        return {"rope_theta": theta}
    values = {name: getattr(scaling, _FIELDS[name]) for name in _OF_KIND[scaling.kind]}
    present = {name: value for name, value in values.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": scaling.kind, **present}}
