"""What a conversion changed: the weights of two models, as their linear layers compute with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from bitnet_jax.models import Architecture, ModelConfig
from bitnet_jax.nn.embedding import rounded, stored_dtype
from bitnet_jax.nn.tables import INTEGER_TABLES
from bitnet_jax.packed.packing import TABLES, Layer, layers, quantize
from bitnet_kernels import PackedArray, dequantize, unpack


@dataclasses.dataclass(frozen=True)
class Change:
    """The difference of one tensor; `relative_error` is that of its root mean square."""

    weights: int
    changed_weights: int
    changed_scales: int
    relative_error: float


@dataclasses.dataclass(frozen=True)
class Differences:
    """The differences of all tensors; `changed` has those that differ, by path."""

    tensors: int
    weights: int
    changed: dict[str, Change]

    @property
    def lossless(self) -> bool:
        return not self.changed

    def describe(self) -> str:
        """One line: lossless, or what changed and by how much."""
        if self.lossless:
            return f"lossless: {self.weights:,d} weights in {self.tensors} tensors are equal"
        weights = sum(change.changed_weights for change in self.changed.values())
        scales = sum(change.changed_scales for change in self.changed.values())
        worst = max(self.changed, key=lambda path: self.changed[path].relative_error)
        return (
            f"changed: {weights:,d} of {self.weights:,d} weights and {scales:,d} scales in {len(self.changed)} of "
            f"{self.tensors} tensors; relative error at most {self.changed[worst].relative_error:.3g} ({worst})"
        )


def differences(
    before: Mapping[str, Any],
    config_before: Architecture,
    after: Mapping[str, Any],
    config_after: Architecture,
) -> Differences:
    """Compares the weights of two models of one shape, one tensor in memory at a time.

    A quantized matrix, packed or latent, is its codes and scales: latent weights that quantize to the same codes and
    scales are equal. Where only one of the two is quantized, the values that the layers multiply with are compared;
    embeddings and float heads are those rounded to config.embedding_dtype.

    Raises:
      ValueError: the models have different parameters; the message names the first.
    """
    first, second = (
        _weights(config, variables) for config, variables in ((config_before, before), (config_after, after))
    )
    if first.keys() != second.keys():
        name = sorted(first.keys() ^ second.keys())[0]
        raise ValueError(f"got models of which only one has {name}, expected two of one shape to compare")
    changed, count = {}, 0
    for name in first:
        change = _change(name, _values(name, *first[name]), _values(name, *second[name]))
        count += change.weights
        if change.changed_weights or change.changed_scales:
            changed[name] = change
    return Differences(len(first), count, changed)


def _weights(
    config: Architecture, variables: Mapping[str, Any]
) -> dict[str, tuple[Any, Layer | None, dict[str, Any]]]:
    """Path -> (leaf, its layer if it is a linear one, all parameters)."""
    flat = flatten_dict(dict(variables["params"]), sep="/")
    for path in TABLES:
        if isinstance(config, ModelConfig) and path in flat:
            dtype = stored_dtype(config, path.split("/")[0])
            if dtype not in (str(flat[path].dtype), *INTEGER_TABLES):
                flat[path] = rounded(flat[path], dtype)
    linear = layers(config)
    packed = flatten_dict(dict(variables.get("packed", {})), sep="/")
    found: dict[str, tuple[Any, Layer | None, dict[str, Any]]] = {}
    for path, layer in linear.items():
        own = layer.latent.startswith(f"{path}/")  # not the embedding of a tied head
        if own or f"{path}/weight" in packed:
            leaf = packed.get(f"{path}/weight", flat.get(layer.latent))
            found[layer.latent if own else f"{path}/weight"] = (leaf, layer, flat)
    scales = {f"{path}/weight_scale" for path in linear}
    return found | {
        path: (leaf, None, flat) for path, leaf in flat.items() if path not in found and path not in scales
    }


def _values(
    name: str, leaf: Any, layer: Layer | None, flat: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """(codes [n, k], scale [n or 1, groups]) of a quantized matrix without a minimum, else (float32 values, None)."""
    if isinstance(leaf, PackedArray) and leaf.minimum is not None:
        return np.asarray(dequantize(leaf)), None
    if isinstance(leaf, PackedArray):
        return np.asarray(unpack(leaf)), np.asarray(leaf.scale, np.float32)
    if layer is not None and layer.precision.quantizes_weights:
        quantized = quantize(name.rpartition("/")[0], layer, flat)
        if quantized.minimum is not None:
            return np.asarray(quantized.dequantize()), None
        return np.asarray(quantized.codes), np.asarray(quantized.scale)
    return np.asarray(leaf).astype(np.float32), None


def _product(codes: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    if scale is None:
        return codes
    n, k = codes.shape
    return (codes.astype(np.float32).reshape(n, scale.shape[1], -1) * scale[..., None]).reshape(n, k)


def _change(
    name: str,
    before: tuple[np.ndarray, np.ndarray | None],
    after: tuple[np.ndarray, np.ndarray | None],
) -> Change:
    if before[0].shape != after[0].shape:
        raise ValueError(
            f"{name}: got {list(after[0].shape)} after {list(before[0].shape)}, expected one shape"
        )
    one, two = _product(*before), _product(*after)
    (codes, scale), (codes_after, scale_after) = before, after
    if scale is not None and scale_after is not None:
        weights = int((codes != codes_after).sum())
        scales = int((np.broadcast_arrays(scale, scale_after)[0] != scale_after).sum())
    else:
        weights, scales = int((one != two).sum()), 0
    size = float(np.sqrt(np.mean(np.square(one, dtype=np.float64))))
    error = float(np.sqrt(np.mean(np.square(two - one, dtype=np.float64))))
    return Change(one.size, weights, scales, error / size if size else error)
