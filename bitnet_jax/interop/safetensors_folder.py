"""Third-party model folders: JSON files, and safetensors in one file or in shards with an index.

Only `*.json` and `*.safetensors` are ever opened; pickled weights (`*.bin`, `*.pt`) are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.packed.tensor_file import StorageError, parse_json
from bitnet_jax.packed.tensor_file import read as read_tensors

_JSON_LIMIT = 1 << 26  # 64 MiB: far more than any real config or index


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      FileNotFoundError: there is no such file.
      StorageError: too large, not UTF-8, not JSON, a repeated key, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face model folder")
    if path.stat().st_size > _JSON_LIMIT:
        raise StorageError(f"{path} has {path.stat().st_size} bytes, expected at most {_JSON_LIMIT}")
    return parse_json(path.read_bytes(), path)


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of `model.safetensors`, or of the shards listed in `model.safetensors.index.json`.

    Returns: read-only views of memory maps; no values are read yet.

    Raises:
      FileNotFoundError: the folder contains neither.
      StorageError: a file is damaged, the index and the shards disagree, or two shards have one tensor with different
        contents.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_tensors(single, aligned=False).tensors
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        reason = f" (pickled {pickled[0]} is never loaded: convert it to safetensors)" if pickled else ""
        raise FileNotFoundError(f"{folder} holds no {single.name} and no {index.name}{reason}")

    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise StorageError(f"{index}: weight_map is missing or empty, expected tensor name -> file name")
    for name, file in shard_of.items():
        # Only plain file names: an index must not refer to files outside its folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise StorageError(f"{index}: {name} is in {file!r}, expected the name of a .safetensors file")
        if not (folder / file).is_file():
            raise StorageError(f"{index} names {file}, which is missing; download the folder again")
    shards = {
        file: read_tensors(folder / file, aligned=False).tensors for file in sorted(set(shard_of.values()))
    }
    for file, tensors in shards.items():
        listed = {name for name, place in shard_of.items() if place == file}
        if wrong := sorted((listed - set(tensors)) | (set(tensors) - set(shard_of))):
            raise StorageError(f"{index} and {file} disagree on {wrong[0]}; download the folder again")
    found = {name: shards[file][name] for name, file in shard_of.items()}
    for file, tensors in shards.items():
        for name in sorted(set(tensors)):
            if shard_of[name] != file and not _equal(tensors[name], found[name]):
                raise StorageError(
                    f"{index}: {name} is in {file} and {shard_of[name]} with different contents, expected one; "
                    "download the folder again"
                )
    return found


def float32(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The values cast to float32, which is exact for every float dtype of these files.

    Raises ValueError: another shape, integers, or values that are not finite.
    """
    if np.issubdtype(tensor.dtype, np.integer) or tensor.shape != shape:
        raise ValueError(
            f"got {tensor.dtype}{list(tensor.shape)}, expected floats {list(shape)}; "
            "check the sizes and the quantization_config of config.json"
        )
    values = tensor.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("got NaN or infinity, expected finite weights; the file is damaged")
    return values


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and np.array_equal(
        np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
    )
