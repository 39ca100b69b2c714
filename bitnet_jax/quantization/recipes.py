"""Precisions by name, and rules that assign one to each linear layer of a model.

A recipe is a named Precision or, where a paper treats layers differently, a tuple of rules (pattern, recipe).
`resolve` turns rules into one Precision per linear path. A name may be followed by overridden fields, as in
"bnn(activation_ste=approx_sign)", so that a config file or command line needs only a string.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from bitnet_jax.names import check_name
from bitnet_jax.quantization.precision import Precision

Recipe = str | Precision | Mapping[str, Any]  # a name in RECIPES, a Precision, or one as a dict (from JSON)
Rules = Recipe | Sequence[tuple[str, Recipe] | list[Any]]  # ordered (path pattern, recipe); lists in JSON

_BITNET = Precision(weight="binary_centred", activation="int8")
_B158 = Precision(weight="ternary_absmean", activation="int8")
_BIT = Precision(
    weight="binary_centred",
    activation="elastic_signed",
    activation_ste="clipped",
    activation_scale="learned",
    activation_shift=True,
)
_PARETOQ = Precision(
    weight="binary",
    weight_ste="clipped",
    scale="learned",
    granularity="channel",
    weight_options=(("count", "matrix"),),
)
_BLOCKS = Precision(weight="int8", activation="int8", granularity=32, scale_dtype="float16")
_replace = dataclasses.replace

RECIPES: dict[str, Precision | tuple[tuple[str, Precision], ...]] = {
    "float32": Precision(),
    "bfloat16": Precision(compute_dtype="bfloat16"),
    # measured scales, 8-bit activations
    "int8": Precision(weight="int8", activation="int8", granularity="channel"),
    "int4": Precision(weight="int4", activation="int8", granularity="channel"),
    "int3": Precision(weight="int3", activation="int8", granularity="channel"),
    "int2": Precision(weight="int2", activation="int8", granularity="channel"),
    # blocks of 32 with float16 scales: llama.cpp's Q8_0, Q4_0 and Q4_1
    "int8_group32": _replace(_BLOCKS, weight="int8", weight_options=(("rounding", "away"),)),
    "int4_group32": _replace(_BLOCKS, weight="int4", weight_options=(("statistic", "signed"),)),
    "uint4_group32": _replace(_BLOCKS, weight="uint4"),
    # weight-only: 16-bit activations, multiplied exactly
    "int8_a16": _replace(_BLOCKS, weight="int8", activation="int16", weight_options=(("rounding", "away"),)),
    "int4_a16": _replace(_BLOCKS, weight="int4", activation="int16", weight_options=(("statistic", "signed"),)),
    "uint4_a16": _replace(_BLOCKS, weight="uint4", activation="int16"),
    "lsq4": Precision(
        weight="int4", weight_ste="clipped", scale="learned", scale_init="lsq", activation="int4",
        activation_ste="clipped", activation_scale="learned",
    ),
    # BitNet (2310.11453): W1 A8
    "bitnet": _BITNET,
    "bitnet_channel": _replace(_BITNET, granularity="channel"),
    "bitnet_group64": _replace(_BITNET, granularity=64),
    "bitnet_group128": _replace(_BITNET, granularity=128),
    "bitnet_group256": _replace(_BITNET, granularity=256),
    "binary_weight_only": _replace(_BITNET, activation="none"),  # BiLM of Spectra
    # BitNet b1.58 (2402.17764): W1.58 A8
    "bitnet_b158": _B158,
    "bitnet_b158_channel": _replace(_B158, granularity="channel"),
    "bitnet_b158_group64": _replace(_B158, granularity=64),
    "bitnet_b158_group128": _replace(_B158, granularity=128),
    "bitnet_b158_group256": _replace(_B158, granularity=256),
    "bitnet_b158_median": _replace(_B158, weight="ternary_absmedian"),
    "twn": _replace(_B158, weight="ternary_twn"),
    "bitnet_weight_only": _replace(_B158, activation="none", weight_options=(("epsilon", "add"),)),  # TriLM
    # low-bit activations: 4 bits for normalized inputs, 8 for heavy-tailed ones
    "bitnet_a48": (
        ("*o_proj", _replace(_B158, top_k=0.5)),
        ("*down_proj", _B158),
        ("*", _replace(_B158, activation="int4")),
    ),
    "bitnet_v2": (
        ("*o_proj", _replace(_B158, hadamard="block")),
        ("*down_proj", _replace(_B158, hadamard="block")),
        ("*", _B158),
    ),
    "bitnet_v2_a4": (
        ("*o_proj", _replace(_B158, activation="int4", hadamard="block")),
        ("*down_proj", _replace(_B158, activation="int4", hadamard="block")),
        ("*", _replace(_B158, activation="int4")),
    ),
    # the first binary networks
    "binaryconnect": Precision(weight="binary_raw", latent_clip=1.0),
    "binaryconnect_stochastic": Precision(weight="binary_stochastic", latent_clip=1.0),
    "bwn": Precision(weight="bwn", weight_ste="clipped", granularity="channel", latent_clip=1.0),
    "xnor": Precision(
        weight="bwn", weight_ste="clipped", granularity="channel", latent_clip=1.0, activation="sign_absmean",
        activation_ste="clipped",
    ),
    "bnn": Precision(weight="binary_raw", latent_clip=1.0, activation="sign", activation_ste="clipped"),
    # Bi-Real Net (1808.00278); its shortcuts belong to the model
    "bireal": Precision(
        weight="binary", weight_ste="clipped", granularity="channel", weight_options=(("window", "raw"),),
        latent_clip=1.0, activation="sign", activation_ste="approx_sign",
    ),
    # BiT (2205.13016): W1 A1 with learned ranges; {0, 1} codes after a ReLU
    "bit": _BIT,
    "bit_relu": (("*down_proj", _replace(_BIT, activation="elastic_unsigned")), ("*", _BIT)),
    # ParetoQ (2502.02631): weight only, learned scale per output row
    "paretoq_1": _PARETOQ,
    "paretoq_1.58": _replace(_PARETOQ, weight="seq_ternary"),
    "paretoq_2": _replace(_PARETOQ, weight="seq_int2"),
    "paretoq_3": _replace(_PARETOQ, weight="int3"),
    "paretoq_4": _replace(_PARETOQ, weight="int4"),
}  # fmt: skip


HEADS = ("lm_head", "classifier")  # not quantized in any BitNet paper


def resolve(rules: Rules, paths: Sequence[str]) -> dict[str, Precision]:
    """One Precision per linear path; the first rule whose pattern (fnmatch, `*` crosses `/`) matches wins.

    A bare recipe is the rule ("*", recipe). A recipe that is itself a tuple of rules is expanded within the
    pattern that refers to it. Heads stay float32 unless a pattern other than "*" matches them.

    Raises:
      ValueError: an unknown recipe, a path that no rule matches, or a pattern that never wins.
    """
    if isinstance(rules, str | Precision | Mapping):
        rules = (("*", rules),)
    resolved: dict[str, Precision] = {}
    winners: set[int] = set()
    unmatched = []
    for path in paths:
        for index, (pattern, recipe) in enumerate(rules):
            if fnmatchcase(path, pattern) and not (path in HEADS and not pattern.strip("*")):
                resolved[path] = _expand(recipe, path)
                winners.add(index)
                break
        else:
            if path in HEADS:
                resolved[path] = Precision()
            else:
                unmatched.append(path)
    if unmatched:
        raise ValueError(
            f"precision rules leave out {unmatched}: got patterns {[pattern for pattern, _ in rules]}, "
            "expected every linear layer to match one; end the rules with ('*', recipe)"
        )
    idle = [
        pattern for index, (pattern, _) in enumerate(rules) if index not in winners and pattern.strip("*")
    ]
    if idle:
        raise ValueError(
            f"unused precision patterns: got {idle}, expected each to be the first match for one of "
            f"{list(paths)}; correct the pattern, or move it before a wider one"
        )
    return resolved


def _expand(recipe: Recipe, path: str) -> Precision:
    """The Precision a recipe gives to one path."""
    if isinstance(recipe, Precision):
        return recipe
    if isinstance(recipe, Mapping):
        return Precision.from_dict(recipe)
    name, overridden, overrides = recipe.partition("(")
    check_name("recipe", name, tuple(RECIPES))
    named = RECIPES[name]
    if not isinstance(named, Precision):
        inner = next((inner for pattern, inner in named if fnmatchcase(path, pattern)), None)
        if inner is None:
            raise ValueError(f"recipe {name!r} has no rule for {path!r}")
        named = _expand(inner, path)
    return dataclasses.replace(named, **_differences(recipe, overrides)) if overridden else named


def _differences(recipe: str, text: str) -> dict[str, Any]:
    """Parses "field=value, field=value)"; values are numbers, True, False, None or unquoted strings."""
    if not text.endswith(")") or "(" in text:
        raise ValueError(f"recipe: got {recipe!r}, expected NAME or NAME(field=value, field=value)")
    fields: dict[str, Any] = {}
    for pair in text[:-1].split(","):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not value:
            raise ValueError(f"recipe {recipe!r}: got {pair.strip()!r}, expected field=value")
        check_name("Precision field", name, [field.name for field in dataclasses.fields(Precision)])
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # an unquoted string
            fields[name] = value
    return fields
