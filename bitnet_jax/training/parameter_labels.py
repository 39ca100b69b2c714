"""The kind of every parameter, and the factor on its rate, by its path, which selects its settings in the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
from jaxtyping import PyTree

from bitnet_jax.names import suggestion

# The first and last linear layers of a model; all others are hidden.
ENDS = ("lm_head", "classifier", "patch_embed", "dense_0", "conv_0")

# Label by the last component of a parameter's path.
LABELS = {
    "weight": "weight",
    "embedding": "embedding",
    "scale": "norm",
    "bias": "bias",
    "weight_scale": "quantizer",
    "activation_scale": "quantizer",
    "activation_shift": "quantizer",
    "probability_scale": "quantizer",
    "a": "adapter",
    "b": "adapter",
}


def label_parameters(params: Mapping[str, Any]) -> PyTree[str]:
    """The tree with leaves `weight` (of a hidden layer), `end` (of a first or last layer), `embedding`, `norm`, `bias`,
    `quantizer` (learned scales, shifts) or `adapter`.

    Raises:
      ValueError: a parameter whose name has no label.
    """

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        names = [key.key for key in path]
        if names[-1] not in LABELS:
            raise ValueError(
                f"parameter {'/'.join(names)}: name {names[-1]!r} has no label, expected one of {', '.join(LABELS)}"
            )
        if names[-1] == "weight" and names[-2:-1] and names[-2] in ENDS:
            return "end"
        return LABELS[names[-1]]

    return jax.tree_util.tree_map_with_path(label, params)


def path_factors(params: Mapping[str, Any], rates: Mapping[str, float]) -> PyTree[float]:
    """The tree with leaves: product of the factors in `rates` whose patterns (fnmatch, `*` crosses `/`) match the
    parameter's path; 1 if none does.

    Raises:
      ValueError: a pattern that matches no parameter.
    """
    used: set[str] = set()
    paths: list[str] = []

    def factor(path: tuple[Any, ...], leaf: Any) -> float:
        paths.append("/".join(key.key for key in path))
        matching = [pattern for pattern in rates if fnmatchcase(paths[-1], pattern)]
        used.update(matching)
        return math.prod((rates[pattern] for pattern in matching), start=1.0)

    factors = jax.tree_util.tree_map_with_path(factor, params)
    if idle := sorted(rates.keys() - used):
        raise ValueError(
            f"optimizer.rates: got {idle[0]!r}, which matches no parameter, expected a pattern of paths such as "
            f"{paths[0]}{suggestion(idle[0], paths)}"
        )
    return factors
