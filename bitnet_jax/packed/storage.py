"""A packed model on disk: a folder of a few files, written atomically and loaded by one memory map.

    model.safetensors   every tensor, 64-byte aligned (tensor_file.py), and the metadata below
    config.json         `architecture` (default: transformer) and the fields of its config
    tokenizer.json      the tokenizer, if any
    classes.json        for a classifier: labels and input preprocessing (data/classes.py)
    conversation.json   begin and end tokens and the chat template, if stated (data/conversation.py)

Metadata (strings, as the format requires): `format` and `version` of this layout, `bitnet_jax` the version that
wrote it, and three JSON tables: `packed` path -> {format, layout, shape}, `crc32` of every tensor (by
tensor_file.py), and `files_crc32` of the other files. Tensors are named `params/<path>`, `packed/<path>/codes`,
`packed/<path>/scale`, for uint4 `packed/<path>/minimum`, and `batch_stats/<path>`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import bitnet_jax
from bitnet_jax.data import Classes, tokenizers
from bitnet_jax.data.classes import CLASSES
from bitnet_jax.data.conversation import CONVERSATION, Conversation, of_documents
from bitnet_jax.models import Architecture, config_fields, config_kind, model_config
from bitnet_jax.packed import packing, tensor_file
from bitnet_jax.packed.atomic_folder import atomic_folder, check_writable, remove_stale, synced_file
from bitnet_jax.packed.tensor_file import RESTORE, StorageError, Streamed
from bitnet_kernels import validate

__all__ = ["PackedModel", "StorageError", "check_target", "load_packed", "save_packed"]

FORMAT, VERSION = "bitnet_jax.packed", "1"
MODEL, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
COLLECTIONS = ("params", "packed", "batch_stats")
VERIFIED_BYTES = 1 << 28  # tensor bytes whose checksums are verified whenever a model is loaded
# Maximum bytes of the small files, far above any real one.
LIMITS = {CONFIG: 1 << 20, CONVERSATION: 1 << 23, CLASSES: 1 << 24, TOKENIZER: 1 << 28}
# Fields not bounded by the tensors: loading the model allocates nothing of their size.
UNBOUNDED = ("max_length", "trained_length", "image_size")

Tensors = Mapping[str, np.ndarray | Streamed]


class PackedModel(NamedTuple):
    config: Architecture
    variables: dict[str, Any]  # for config.module().apply
    tokenizer: tokenizers.Tokenizer | None
    classes: Classes | None  # of a classifier
    conversation: Conversation


def save_packed(
    folder: str | Path,
    variables: Mapping[str, Any],
    config: Architecture,
    tokenizer: tokenizers.Tokenizer | None = None,
    classes: Classes | None = None,
    *,
    conversation: Conversation | None = None,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a packed model (or one of float recipes, whose "packed" is empty) as a folder.

    Everything is written to a hidden sibling folder first, which is renamed once it is safely on disk
    (atomic_folder.py), so a reader sees either the old folder or the new one.

    Args:
      variables: arrays, or `tensor_file.Streamed` for arrays that do not fit into memory; the contents of these are
        not validated.
      conversation: begin and end tokens and the chat template; None: `conversation.of_documents(tokenizer)`, those of
        a model trained here.
      on_bytes: called with the number of bytes of each piece written, for a progress bar.

    Raises:
      StorageError: the folder exists (without overwrite) or contains anything but a packed model (with it); the
        variables do not match config; or an operating system error (no space, no permission).
    """
    folder = Path(folder)
    check_target(folder, overwrite)
    variables = {name: dict(variables.get(name, {})) for name in COLLECTIONS}
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
            f"{folder}: packed formats, layouts or shapes do not match the config; pack it again"
        )

    texts = {CONFIG: json.dumps(config_fields(config), indent=2) + "\n"}
    if model_config(json.loads(texts[CONFIG])) != config:
        raise StorageError(f"{folder}: the config changes in a JSON round trip; use plain values in it")
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer.to_json()
    if classes is not None:
        _check_classes(classes, config, folder)
        texts[CLASSES] = classes.to_json()
    if conversation is not None:
        _check_conversation(conversation, config, folder)
        texts[CONVERSATION] = conversation.to_json()
    contents = {name: text.encode() for name, text in texts.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "bitnet_jax": bitnet_jax.__version__,
        "packed": json.dumps(_packed_metadata(variables["packed"])),
        "files_crc32": json.dumps({name: zlib.crc32(content) for name, content in contents.items()}),
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_folder(folder, nbytes, overwrite=overwrite) as temporary:
        with synced_file(temporary / MODEL) as file:
            tensor_file.write(file, tensors, metadata, on_bytes)
        for name, content in contents.items():
            with synced_file(temporary / name) as file:
                file.write(content)


def load_packed(folder: str | Path, verify: bool | None = None) -> PackedModel:
    """Memory-maps a folder written by `save_packed`.

    On a CPU the arrays are views of the file: nothing is copied, and pages are loaded on first use and can be
    evicted. Never donate them, and never change the file in place (save_packed does not).

    Always checked: checksums of the small files; names, shapes, dtypes and sizes of all tensors; that scales are
    finite.

    Args:
      verify: which tensors are read once and compared with their checksums. True: all. None: the smallest ones, up
        to VERIFIED_BYTES in total (0.15 s of processor time, in several threads): a model up to that size is verified
        completely, a larger one except for its largest matrices, which are verified after packing and on request
        (`bitnet-jax info --verify`). False: none. In a completely verified model, codes that no packer writes are
        refused too.

    Raises:
      StorageError: a file is missing, damaged, truncated, of a newer version, or inconsistent with the others.
    """
    folder = Path(folder)
    path = folder / MODEL
    contents = {CONFIG: _read(folder / CONFIG)}
    contents |= {name: _read(folder / name) for name in LIMITS if name != CONFIG and (folder / name).exists()}
    file = tensor_file.read(path)
    tensors, metadata = file.tensors, file.metadata
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise StorageError(
            f"{path}: got format {metadata.get('format')!r:.40}, version {metadata.get('version')!r:.40}, expected "
            f"{FORMAT!r}, {VERSION!r}; update bitnet_jax or pack the model again"
        )
    tables = {
        name: tensor_file.parse_json(metadata.get(name, "").encode(), path)
        for name in ("packed", "crc32", "files_crc32")
    }
    got = {name: zlib.crc32(content) for name, content in contents.items()}
    _check_crc32(got, tables["files_crc32"], folder)

    config = _config(tensor_file.parse_json(contents[CONFIG], folder / CONFIG), tensors, folder / CONFIG)
    try:
        expected = packing.abstract(config)
    except Exception as error:  # an invalid config may fail anywhere in the model
        raise StorageError(
            f"{folder / CONFIG}: got a config that describes no model ({_one_line(error)}); {RESTORE}"
        ) from error
    _check_tensors(tensors, expected, str(path))
    if tables["packed"] != _packed_metadata(expected["packed"]):
        raise StorageError(f"{path}: packed formats, layouts or shapes do not match {CONFIG}; {RESTORE}")
    verified = _to_verify(tensors, verify)
    listed = {name: tables["crc32"].get(name) for name in tensors}
    _check_crc32(listed | _crc32(tensors, verified), tables["crc32"], path)
    file.release()  # a step needs only a few rows of the embedding, which may be half of a small model

    # The structure comes from the config, the bytes from the file.
    variables = jax.tree.unflatten(
        jax.tree.structure(expected),
        jax.device_put([tensors[name] for name in _names_in_leaf_order(expected)]),
    )
    for name, weight in _flatten(variables["packed"]).items():
        try:
            for leaf in ("scale", "minimum"):
                numbers = tensors.get(f"packed/{name}/{leaf}")
                if numbers is not None and not np.isfinite(numbers).all():
                    raise ValueError(f"{leaf} contains NaN or infinity; expected finite values")
            validate(weight, contents=len(verified) == len(tensors))
        except ValueError as error:
            raise StorageError(f"{path}: {name}: {error}; {RESTORE}") from error
    tokenizer = classes = None
    if TOKENIZER in contents:
        tokenizer = _parsed(tokenizers.from_json, folder / TOKENIZER, contents[TOKENIZER])
    if CLASSES in contents:
        classes = _parsed(Classes.from_json, folder / CLASSES, contents[CLASSES])
        _check_classes(classes, config, folder)
    conversation = of_documents(tokenizer)  # also of folders written before conversation.json existed
    if CONVERSATION in contents:
        conversation = _parsed(Conversation.from_json, folder / CONVERSATION, contents[CONVERSATION])
        _check_conversation(conversation, config, folder)
    return PackedModel(config, variables, tokenizer, classes, conversation)


def _parsed(parse: Callable[[str], Any], path: Path, content: bytes) -> Any:
    try:
        return parse(content.decode("utf-8"))
    except ValueError as error:
        raise StorageError(f"{path}: {_one_line(error)}; {RESTORE}") from error


def _check_classes(classes: Classes, config: Architecture, folder: Path) -> None:
    outputs = getattr(config, "num_classes", 0)
    if outputs != len(classes.names) or (classes.task == "images") != hasattr(config, "image_size"):
        raise StorageError(
            f"{folder / CLASSES}: got {len(classes.names)} classes of task {classes.task}, the config has {outputs}; "
            "do both belong to the same model?"
        )


def _check_conversation(conversation: Conversation, config: Architecture, folder: Path) -> None:
    try:
        conversation.check_vocabulary(getattr(config, "vocab_size", 0))
    except ValueError as error:
        raise StorageError(f"{folder / CONVERSATION}: {error}; do both belong to the same model?") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _to_verify(tensors: Mapping[str, np.ndarray], verify: bool | None) -> set[str]:
    """Names of the tensors whose checksums are verified, see `load_packed`."""
    if verify is not None:
        return set(tensors) if verify else set()
    chosen, room = set(), VERIFIED_BYTES
    for name in sorted(tensors, key=lambda name: tensors[name].nbytes):
        room -= tensors[name].nbytes
        if room < 0:
            break
        chosen.add(name)
    return chosen


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(dict(tree), sep="/")


def _tensors(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Name in the file -> array (or its shape and dtype)."""
    tensors = {
        f"{collection}/{path}": leaf
        for collection in ("params", "batch_stats")
        for path, leaf in _flatten(variables.get(collection, {})).items()
    }
    for path, weight in _flatten(variables["packed"]).items():
        leaves = {"codes": weight.codes, "scale": weight.scale, "minimum": weight.minimum}
        tensors |= {f"packed/{path}/{name}": leaf for name, leaf in leaves.items() if leaf is not None}
    return tensors


def _packed_metadata(packed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        path: {"format": weight.format, "layout": weight.layout, "shape": list(weight.shape)}
        for path, weight in _flatten(packed).items()
    }


def _crc32(tensors: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, int]:
    """Checksums of these tensors, largest first, in threads: zlib releases the GIL."""

    def checksum(name: str) -> tuple[str, int]:
        return name, zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)

    order = sorted(names, key=lambda name: -tensors[name].nbytes)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(threads.map(checksum, order))


def _check_crc32(got: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    differing = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    if differing:
        name = differing[0]
        raise StorageError(
            f"{where}: {name} has the checksum {got.get(name)}, expected {expected.get(name)} "
            f"({len(differing)} of {len(expected)} differ): the file was changed or damaged; {RESTORE}"
        )


def _check_tensors(tensors: Tensors, expected: Mapping[str, Any], where: str) -> None:
    """Checks that the tensors have exactly the names, shapes and dtypes that the config implies."""
    wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _tensors(expected).items()}
    got = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
    differing = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if differing:
        name = differing[0]
        has, needs = (
            f"{t[name][1]}{list(t[name][0])}" if name in t else "no such tensor" for t in (got, wanted)
        )
        raise StorageError(
            f"{where}: {name[:120]}: got {has}, the config expects {needs} "
            f"({len(differing)} of {len(wanted)} differ); do both belong to the same model?"
        )


def _config(fields: dict[str, Any], tensors: Tensors, path: Path) -> Architecture:
    """The config, with its sizes first checked against the file, so that wrong ones cost no time or memory."""
    limit = 8 * sum(
        tensor.nbytes for tensor in tensors.values()
    )  # a dimension takes at least one bit in the file
    counts = ("num_layers", "convolutions")
    try:
        for field in dataclasses.fields(config_kind(fields)):  # type: ignore[arg-type]
            value = fields.get(field.name)
            bound = 2**31 - 1 if field.name in UNBOUNDED else len(tensors) if field.name in counts else limit
            several = value if isinstance(value, list) and field.name == "widths" else [value]
            if len(several) > len(tensors) + 1 or any(
                type(n) is int and not 0 <= n <= bound for n in several
            ):
                raise ValueError(f"{field.name}: got {str(value)[:40]}, the file has room for {bound}")
        return model_config(fields)
    except Exception as error:  # wrong types can raise any error
        raise StorageError(f"{path}: {_one_line(error)}; {RESTORE}") from error


def _names_in_leaf_order(variables: Mapping[str, Any]) -> list[str]:
    """The tensor names in the order of jax.tree.leaves(variables)."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def _read(path: Path) -> bytes:
    limit = LIMITS[path.name]
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise StorageError(f"{path}: got something other than a regular file; {RESTORE}")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({error.strerror}); expected a folder with {MODEL} and {CONFIG}"
        ) from error
    if len(content) > limit:
        raise StorageError(f"{path}: got more than {limit} bytes; {RESTORE}")
    return content


def check_target(folder: Path, overwrite: bool) -> None:
    """Checks, before any work, that a packed model can be written to `folder`; `save_packed` checks again.

    Raises:
      StorageError: the folder exists (without overwrite), contains anything but a packed model (with it), or its
        parent folder is not writable.
    """
    remove_stale(folder)
    if folder.exists() or folder.is_symlink():
        if not overwrite:
            raise StorageError(f"{folder} exists; choose another folder or pass overwrite=True")
        # Overwriting removes the folder: make sure that it is a packed model.
        is_folder = folder.is_dir() and not folder.is_symlink()
        names = {entry.name for entry in folder.iterdir()} if is_folder else set()
        if not {MODEL, CONFIG} <= names <= {MODEL, *LIMITS}:
            raise StorageError(
                f"{folder} is not a packed model and will not be overwritten; choose another folder"
            )
    check_writable(folder)
