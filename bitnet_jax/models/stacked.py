"""Parameters of equal consecutive layers as one tree of arrays with a leading axis, for a scan over layers.

    per layer    layers_0/attention/q_proj/weight [n, k], layers_1/attention/q_proj/weight [n, k], ...
    stacked      layers_0-31/attention/q_proj/weight [32, n, k]

The blocks of a model whose parameters are stacked run as a scan, one block traced per run of equal layers, so the size
of a compiled update does not depend on depth. Only a training state is ever stacked: parameters are created, saved,
packed and exported under their names per layer. Layers are equal if their precisions and rotary settings are; a layer
without an equal neighbor keeps its own name.

All functions take any tree that holds layers by name somewhere, such as variables or the state of an optimizer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.quantization.precision import Precision

_LAYER = re.compile(r"layers_(\d+)")
_RUN = re.compile(r"layers_(\d+)-(\d+)")

Runs = Sequence[range]


def layer_precisions(config: TransformerShape) -> list[dict[str, Precision]]:
    """For each block: path of every linear layer inside it -> its Precision."""
    blocks: list[dict[str, Precision]] = [{} for _ in range(config.num_layers)]
    for path, precision in config.precisions().items():
        name, _, inside = path.partition("/")
        if found := _LAYER.fullmatch(name):
            blocks[int(found[1])][inside] = precision
    return blocks


def equal_layers(config: TransformerShape) -> tuple[range, ...]:
    """All layers as maximal runs of equal consecutive ones."""

    precisions = layer_precisions(config)

    def kind(layer: int) -> tuple[dict[str, Precision], bool]:
        return precisions[layer], layer in config.no_rope_layers

    runs = [list(run) for _, run in itertools.groupby(range(config.num_layers), kind)]
    return tuple(range(run[0], run[-1] + 1) for run in runs)


def run_name(run: range) -> str:
    return f"layers_{run[0]}-{run[-1]}" if len(run) > 1 else f"layers_{run[0]}"


def layers_of(name: str) -> range | None:
    """The layers that are stacked under one name, or None if it is not such a name."""
    found = _RUN.fullmatch(name)
    return None if found is None else range(int(found[1]), int(found[2]) + 1)


def is_stacked(path: str) -> bool:
    """Whether the arrays at a path joined by "/" have a leading axis of layers."""
    return any(layers_of(name) for name in path.split("/"))


def path_in_first_layer(path: str) -> str:
    """The path of the same parameter in the first of the layers stacked in it; other paths are unchanged."""
    return "/".join(f"layers_{run[0]}" if (run := layers_of(name)) else name for name in path.split("/"))


def located(params: Mapping[str, PyTree], path: str) -> tuple[str, int]:
    """Where the parameters of a layer-wise path are: their path in `params`, and the index in a stack (else 0)."""
    name, _, rest = path.partition("/")
    if found := _LAYER.fullmatch(name):
        for key in params:
            if (run := layers_of(key)) and int(found[1]) in run:
                return f"{key}/{rest}", int(found[1]) - run[0]
    return path, 0


def stack(tree: PyTree, runs: Runs) -> PyTree:
    """The tree with the layers of each run stacked. A run of one layer is left alone."""

    def stacked(layers: Mapping[str, PyTree]) -> dict[str, PyTree]:
        rest = {name: part for name, part in layers.items() if not _LAYER.fullmatch(name)}
        for run in runs:
            parts = [layers[f"layers_{i}"] for i in run]
            rest[run_name(run)] = jax.tree.map(lambda *x: jnp.stack(x), *parts) if len(run) > 1 else parts[0]
        return rest

    return _each(tree, _LAYER, stacked)


def unstack(tree: PyTree) -> PyTree:
    """The inverse of `stack`: every layer under its own name."""

    def one(part: PyTree, i: int) -> PyTree:
        return jax.tree.map(lambda x: x[i], part)

    def unstacked(layers: Mapping[str, PyTree]) -> dict[str, PyTree]:
        flat: dict[str, PyTree] = {}
        for name, part in layers.items():
            run = layers_of(name)
            flat |= {name: part} if run is None else {f"layers_{i}": one(part, i - run[0]) for i in run}
        return flat

    return _each(tree, _RUN, unstacked)


def stack_like(tree: PyTree, like: PyTree) -> PyTree:
    """The tree with names per layer, stacked as `like` is: the inverse of `unstack(like)`."""
    names = {getattr(key, "key", "") for path, _ in jax.tree_util.tree_leaves_with_path(like) for key in path}
    runs = [run for name in sorted(map(str, names)) if (run := layers_of(name))]
    if not runs:
        return tree
    within = {i for run in runs for i in run}
    alone = [int(found[1]) for name in names if (found := _LAYER.fullmatch(str(name)))]
    return stack(tree, [*runs, *(range(i, i + 1) for i in alone if i not in within)])


def _each(
    tree: PyTree, name: re.Pattern[str], change: Callable[[Mapping[str, PyTree]], dict[str, PyTree]]
) -> PyTree:
    """Applies `change` to every mapping in the tree with a key that is such a name."""

    def holds_layers(part: PyTree) -> bool:
        return isinstance(part, Mapping) and any(isinstance(key, str) and name.fullmatch(key) for key in part)

    return jax.tree.map(lambda part: change(part) if holds_layers(part) else part, tree, is_leaf=holds_layers)
