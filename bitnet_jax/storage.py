"""A packed model on disk: a folder with three files, written whole or not at all, loaded by one memory map.

    model.safetensors   every tensor, 64-byte aligned (tensor_file.py), and in its metadata what follows
    config.json         ModelConfig.to_dict()
    tokenizer.json      the tokenizer, where there is one

Metadata (strings, as the format demands): `format` and `version` of this page, `bitnet_jax` the version that
wrote it, and three JSON tables: `packed` path -> {format, layout, shape}, `crc32` of every tensor (by
tensor_file.py), and `files_crc32` of the two other files. Tensors are named `params/<path>`, `packed/<path>/codes` and
`packed/<path>/scale`.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import bitnet_jax
from bitnet_jax import packing, tensor_file
from bitnet_jax.data import tokenizers
from bitnet_jax.nn.config import ModelConfig
from bitnet_jax.tensor_file import RESTORE, StorageError, Streamed
from bitnet_jax.whole_folder import synced_file, whole_folder
from bitnet_kernels import validate

__all__ = ["StorageError", "load_packed", "save_packed"]

FORMAT, VERSION = "bitnet_jax.packed", "1"
MODEL, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
VERIFIED_BYTES = 1 << 28  # a model file of up to so many bytes is read and verified whenever it is loaded
JSON_LIMIT = 1 << 28  # bytes of config.json or tokenizer.json: far above any real one

Tensors = Mapping[str, np.ndarray | Streamed]


def save_packed(
    folder: str | Path,
    variables: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: tokenizers.Tokenizer | None = None,
    *,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a packed model (or one of float recipes, whose "packed" is empty) as a folder.

    Everything goes to a hidden sibling first and is renamed when it is safely on disk (whole_folder.py), so a
    reader sees the old folder or the new one.

    Args:
      variables: arrays, or `tensor_file.Streamed` where one would not fit into memory; nobody looks at the
        contents of those but the writer.
      on_bytes: is told the bytes of each piece that was written, for a progress bar.

    Raises:
      StorageError: the folder exists (without overwrite) or holds other things than a packed model (with it);
        the variables are not those of config; or the operating system refuses (no space, no permission).
    """
    folder = Path(folder)
    _check_target(folder, overwrite)
    variables = {"params": dict(variables["params"]), "packed": dict(variables.get("packed", {}))}
    for name, weight in _flatten(variables["packed"]).items():
        try:
            validate(weight, contents=not isinstance(weight.codes, Streamed))
        except ValueError as error:
            raise StorageError(f"{name}: {error}; pack the model again") from error
    tensors = {
        name: leaf if isinstance(leaf, Streamed) else np.asarray(leaf)
        for name, leaf in _tensors(variables).items()
    }
    expected = packing.abstract(config)
    _check_tensors(tensors, expected, f"{folder}: the variables")
    if _packed_metadata(variables["packed"]) != _packed_metadata(expected["packed"]):
        raise StorageError(
            f"{folder}: packed formats, layouts or shapes are not those of the config; pack it again"
        )

    texts = {CONFIG: json.dumps(config.to_dict(), indent=2) + "\n"}
    if ModelConfig.from_dict(json.loads(texts[CONFIG])) != config:
        raise StorageError(f"{folder}: the config changes on a trip through JSON; use plain values in it")
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer.to_json()
    contents = {name: text.encode() for name, text in texts.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "bitnet_jax": bitnet_jax.__version__,
        "packed": json.dumps(_packed_metadata(variables["packed"])),
        "files_crc32": json.dumps({name: zlib.crc32(content) for name, content in contents.items()}),
    }
    with whole_folder(folder, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        with synced_file(temporary / MODEL) as file:
            tensor_file.write(file, tensors, metadata, on_bytes)
        for name, content in contents.items():
            with synced_file(temporary / name) as file:
                file.write(content)


def load_packed(
    folder: str | Path, verify: bool | None = None
) -> tuple[ModelConfig, dict[str, Any], tokenizers.Tokenizer | None]:
    """Maps a folder that `save_packed` wrote: (config, variables for Transformer.apply, tokenizer or None).

    On a CPU the arrays are views of the file: nothing is copied, pages come in when they are first used and
    can be dropped again. Never donate them, and never change the file in place (save_packed does not).

    Names, shapes, dtypes and sizes are checked always, which is instant.

    Args:
      verify: also read everything once, compare checksums and look for codes that no packer writes. None: for
        files of up to VERIFIED_BYTES; a larger one would make its user wait, and is verified where that is asked
        for (`bitnet-jax info --verify`) and after it was packed.

    Raises:
      StorageError: a file is missing, damaged, truncated, of a newer version, or does not fit the others.
    """
    folder = Path(folder)
    path = folder / MODEL
    contents = {CONFIG: _read(folder / CONFIG)}
    if (folder / TOKENIZER).exists():
        contents[TOKENIZER] = _read(folder / TOKENIZER)
    tensors, metadata = tensor_file.read(path)
    if verify is None:
        verify = sum(tensor.nbytes for tensor in tensors.values()) <= VERIFIED_BYTES
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise StorageError(
            f"{path}: got format {metadata.get('format')!r}, version {metadata.get('version')!r}, expected "
            f"{FORMAT!r}, {VERSION!r}; update bitnet_jax or pack the model again"
        )
    tables = {
        name: tensor_file.parse_json(metadata.get(name, "").encode(), path)
        for name in ("packed", "crc32", "files_crc32")
    }
    if verify:
        got = {name: zlib.crc32(content) for name, content in contents.items()}
        _check_crc32(got, tables["files_crc32"], folder)

    config = _config(tensor_file.parse_json(contents[CONFIG], folder / CONFIG), tensors, folder / CONFIG)
    try:
        expected = packing.abstract(config)
    except Exception as error:  # a hostile config may fail anywhere in the model; it must only fail clearly
        raise StorageError(f"{folder / CONFIG}: it describes no model ({error}); {RESTORE}") from error
    _check_tensors(tensors, expected, str(path))
    if tables["packed"] != _packed_metadata(expected["packed"]):
        raise StorageError(f"{path}: packed formats, layouts or shapes are not those of {CONFIG}; {RESTORE}")
    if verify:
        _check_crc32({name: _crc32(tensor) for name, tensor in tensors.items()}, tables["crc32"], path)

    # The structure comes from the config, the bytes from the file.
    variables = jax.tree.unflatten(
        jax.tree.structure(expected),
        jax.device_put([tensors[name] for name in _names_in_leaf_order(expected)]),
    )
    if verify:
        for name, weight in _flatten(variables["packed"]).items():
            try:
                validate(weight)
            except ValueError as error:
                raise StorageError(f"{path}: {name}: {error}; {RESTORE}") from error
    tokenizer = None
    if TOKENIZER in contents:
        try:
            tokenizer = tokenizers.from_json(contents[TOKENIZER].decode("utf-8"))
        except ValueError as error:
            raise StorageError(f"{folder / TOKENIZER}: {error}; {RESTORE}") from error
    return config, variables, tokenizer


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def _tensors(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Name in the file -> array (or its shape and dtype)."""
    tensors = {f"params/{path}": leaf for path, leaf in _flatten(variables["params"]).items()}
    for path, weight in _flatten(variables["packed"]).items():
        tensors |= {f"packed/{path}/codes": weight.codes, f"packed/{path}/scale": weight.scale}
    return tensors


def _packed_metadata(packed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        path: {"format": weight.format, "layout": weight.layout, "shape": list(weight.shape)}
        for path, weight in _flatten(packed).items()
    }


def _crc32(tensor: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _check_crc32(got: Mapping[str, int], expected: Mapping[str, Any], where: Path) -> None:
    differing = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    if differing:
        name = differing[0]
        raise StorageError(
            f"{where}: {name} has the checksum {got.get(name)}, expected {expected.get(name)} "
            f"({len(differing)} of {len(expected)} differ): it was changed or damaged; {RESTORE}"
        )


def _check_tensors(tensors: Tensors, expected: Mapping[str, Any], where: str) -> None:
    """Every tensor that the config asks for, with its shape and dtype, and no other."""
    wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _tensors(expected).items()}
    got = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
    differing = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if differing:
        name = differing[0]
        has, needs = (
            f"{t[name][1]}{list(t[name][0])}" if name in t else "no such tensor" for t in (got, wanted)
        )
        raise StorageError(
            f"{where}: {name[:120]}: got {has}, expected by the config {needs} "
            f"({len(differing)} of {len(wanted)} differ); do both belong to one model?"
        )


def _config(fields: dict[str, Any], tensors: Tensors, path: Path) -> ModelConfig:
    """The ModelConfig, after its sizes were held against the file: a lie must not cost time or memory."""
    limit = 8 * sum(tensor.nbytes for tensor in tensors.values())  # a dimension has a bit or more in the file
    for field in dataclasses.fields(ModelConfig):
        value = fields.get(field.name)
        bound = len(tensors) if field.name == "num_layers" else limit
        if field.name in ("max_length", "trained_length"):  # may exceed every dimension of a tensor
            continue
        if type(value) is int and not 0 <= value <= bound:
            raise StorageError(
                f"{path}: {field.name}={str(value)[:40]}, the file has room for {bound}; {RESTORE}"
            )
    try:
        return ModelConfig.from_dict(fields)
    except Exception as error:  # wrong types fail in many ways; the message is one line either way
        raise StorageError(f"{path}: {error}; {RESTORE}") from error


def _names_in_leaf_order(variables: Mapping[str, Any]) -> list[str]:
    """The tensor names in the order of jax.tree.leaves(variables)."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({error.strerror}); expected a folder with {MODEL} and {CONFIG}"
        ) from error
    if len(content) > JSON_LIMIT:
        raise StorageError(f"{path}: got more than {JSON_LIMIT} bytes; {RESTORE}")
    return content


def _check_target(folder: Path, overwrite: bool) -> None:
    if not (folder.exists() or folder.is_symlink()):
        return
    if not overwrite:
        raise StorageError(f"{folder} exists; choose another folder or pass overwrite=True")
    # Overwriting removes the folder: be sure that it is one of ours.
    is_folder = folder.is_dir() and not folder.is_symlink()
    names = {entry.name for entry in folder.iterdir()} if is_folder else set()
    if not {MODEL, CONFIG} <= names <= {MODEL, CONFIG, TOKENIZER}:
        raise StorageError(f"{folder} is no packed model and will not be overwritten; choose another folder")
