"""Adapter files: a low-rank adapter (nn/adapter.py) of one packed model, beside it.

    adapter = load_adapter("support.safetensors", "smollm2-packed")
    variables = with_adapters(model.variables, [(adapter, 1.0)])     # without it, the model is what it was

A file is a safetensors file of `<path of the layer>/a` and `/b`, bfloat16, with the metadata `format`, `version`,
`scale` (alpha / r), and `base`: the fingerprint of the packed model that it was trained with. It fits no other one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bitnet_jax.models import ModelConfig
from bitnet_jax.nn.adapter import COLLECTION
from bitnet_jax.packed import storage, tensor_file
from bitnet_jax.packed.atomic_folder import check_writable, synced_file
from bitnet_jax.packed.tensor_file import RESTORE, StorageError

FORMAT, VERSION = "bitnet_jax.adapter", "1"


class Adapter(NamedTuple):
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]  # path -> a [r, k], b [n, r]; bfloat16
    scale: float
    base: str  # fingerprint of the packed model


def fingerprint(folder: str | Path) -> str:
    """16 hex digits of a packed model: of the checksums of its tensors, its config and its tokenizer.

    Raises StorageError: not a packed model.
    """
    path = Path(folder) / storage.MODEL
    if not path.is_file():
        raise StorageError(
            f"got {folder}, expected the folder of a packed model; write one with `bitnet-jax pack`"
        )
    metadata = tensor_file.read(path).metadata
    files = tensor_file.parse_json(metadata.get("files_crc32", "").encode(), path)
    named = {name: files.get(name) for name in (storage.CONFIG, storage.TOKENIZER)}
    parts = json.dumps([named, metadata.get("packed"), metadata.get("crc32")], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Path -> [n, k] of the layers that may have an adapter: the linear layers of the blocks."""
    return {path: shape for path, shape in config.linear_shapes().items() if path.startswith("layers_")}


def save_adapter(path: str | Path, adapter: Adapter, *, overwrite: bool = False) -> None:
    """Writes the file, complete or not at all.

    Raises StorageError: it exists (without overwrite) or cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise StorageError(f"{path} exists, expected a new file; choose another name or --overwrite")
    check_writable(path)
    tensors = {
        f"{name}/{part}": np.asarray(value)
        for name, pair in adapter.layers.items()
        for part, value in zip("ab", pair, strict=True)
    }
    metadata = {"format": FORMAT, "version": VERSION, "scale": repr(adapter.scale), "base": adapter.base}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with synced_file(temporary) as file:
            tensor_file.write(file, tensors, metadata)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_adapter(path: str | Path, base: str | Path, config: ModelConfig) -> Adapter:
    """The adapter of a file.

    Args:
      base: folder of the packed model that it is to be used with.
      config: of that model.

    Raises:
      StorageError: damaged, not an adapter, or the adapter of another model.
    """
    path = Path(path)
    tensors, metadata, _ = tensor_file.read(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise StorageError(
            f"{path}: got format {metadata.get('format')!r:.40}, version {metadata.get('version')!r:.40}, expected "
            f"{FORMAT!r}, {VERSION!r}; write it with `bitnet-jax adapter`"
        )
    listed = tensor_file.parse_json(metadata.get("crc32", "").encode(), path)
    if any(listed.get(name) != zlib.crc32(x.tobytes()) for name, x in tensors.items()):
        raise StorageError(f"{path}: a tensor does not have its checksum; {RESTORE}")
    if metadata.get("base") != (own := fingerprint(base)):
        raise StorageError(
            f"{path}: got the adapter of the model {metadata.get('base')!r:.40}, expected one of {base}, which is "
            f"{own!r}; use the model that it was trained with, or train it again"
        )
    layers = _layers(path, tensors, layer_shapes(config))
    try:
        scale = float(metadata["scale"])
    except (KeyError, ValueError):
        scale = math.nan
    if not math.isfinite(scale):
        raise StorageError(f"{path}: got scale {metadata.get('scale')!r:.40}, expected a number; {RESTORE}")
    return Adapter(layers, scale, own)


def _layers(
    path: Path, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = {name.rpartition("/")[0] for name in tensors}
    complete = {f"{name}/{part}" for name in names for part in "ab"}
    if not names or names - shapes.keys() or complete != set(tensors):
        raise StorageError(f"{path}: got tensors that are not those of the model's layers; {RESTORE}")
    found = {}
    for name in sorted(names):
        (n, k), a, b = shapes[name], tensors[f"{name}/a"], tensors[f"{name}/b"]
        if (
            a.ndim != 2
            or a.shape[1] != k
            or b.shape != (n, a.shape[0])
            or {a.dtype, b.dtype} != {jnp.bfloat16.dtype}
        ):
            raise StorageError(
                f"{path}: {name}: got a {a.dtype} {list(a.shape)}, b {b.dtype} {list(b.shape)}, expected bfloat16 "
                f"[r, {k}] and [{n}, r]; {RESTORE}"
            )
        if not (np.isfinite(a.astype(np.float32)).all() and np.isfinite(b.astype(np.float32)).all()):
            raise StorageError(f"{path}: {name}: got NaN or infinity, expected finite values; train it again")
        found[name] = (a, b)
    return found


def padded(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The same adapters with arrays of the same layers and the largest rank, filled with zeros, which change no bit of
    their outputs: a program compiled for one takes all of them."""
    shapes: dict[str, tuple[int, int, int]] = {}
    for adapter in adapters.values():
        for name, (a, b) in adapter.layers.items():
            rank = max(len(a), shapes.get(name, (0, 0, 0))[0])
            shapes[name] = (rank, a.shape[1], len(b))

    def filled(adapter: Adapter) -> Adapter:
        layers = {}
        for name, (rank, k, n) in shapes.items():
            a, b = np.zeros((rank, k), jnp.bfloat16), np.zeros((n, rank), jnp.bfloat16)
            if name in adapter.layers:
                given = adapter.layers[name]
                a[: len(given[0])], b[:, : len(given[0])] = given
            layers[name] = (a, b)
        return adapter._replace(layers=layers)

    return {name: filled(adapter) for name, adapter in adapters.items()}


def with_adapters(variables: Mapping[str, Any], adapters: Sequence[tuple[Adapter, float]]) -> dict[str, Any]:
    """The variables of a model with the sum of some adapters, each times its weight, in place of those it has.

    Their ranks stand one after the other; the order matters for rounding only.
    """
    stacked: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter.layers):
        pairs = [
            (*adapter.layers[name], adapter.scale * weight)
            for adapter, weight in adapters
            if name in adapter.layers
        ]
        stacked[name] = {
            "a": jnp.concatenate([jnp.asarray(a, jnp.float32) for a, _, _ in pairs]),
            "b": jnp.concatenate([jnp.asarray(b, jnp.float32) for _, b, _ in pairs], axis=1),
            "scale": jnp.concatenate([jnp.full(len(a), scale, jnp.float32) for a, _, scale in pairs]),
        }
    others = {name: part for name, part in variables.items() if name != COLLECTION}
    return others | ({COLLECTION: unflatten_dict(stacked, sep="/")} if stacked else {})
