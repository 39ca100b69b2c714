"""Writes GGUF files, version 3, little endian: one pass, atomic, one tensor in memory at a time."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bitnet_jax.interop.gguf_file import (
    ALIGNMENT,
    DTYPES,
    KINDS,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    Value,
)
from bitnet_jax.interop.gguf_types import TensorType
from bitnet_jax.packed.atomic_folder import synced_file
from bitnet_jax.packed.tensor_file import StorageError

VERSION = 3


class NewTensor(NamedTuple):
    """A tensor to be written; `content` is called once, when its turn comes, and returns uint8 [nbytes]."""

    name: str
    type: TensorType
    shape: tuple[int, ...]  # outermost first
    content: Callable[[], np.ndarray]


def write(
    path: str | Path, metadata: Mapping[str, Value], tensors: Sequence[NewTensor], *, overwrite: bool = False
) -> None:
    """Writes a file that `gguf_file.read` reads: to a hidden sibling, which is renamed when it is complete.

    Raises:
      StorageError: the file exists (without overwrite), is not a GGUF file (with it), a name or value
        that the format cannot hold, a content of another size than its type and shape need, or an operating system
        error.
      ValueError: raised by `content`, after its tensor's name.
    """
    path = Path(path)
    if path.exists() and (not overwrite or not path.is_file()):
        raise StorageError(
            f"{path} exists; choose another file" + (" or pass overwrite=True" if path.is_file() else "")
        )
    if path.exists():
        with path.open("rb") as old:
            if old.read(len(MAGIC)) != MAGIC:
                raise StorageError(
                    f"{path} is not a GGUF file and will not be overwritten; choose another file"
                )
    header = _header(path, metadata, tensors)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with synced_file(temporary) as file:
            file.write(header)
            file.write(b"\0" * (-len(header) % ALIGNMENT))
            for tensor in tensors:
                _write_tensor(file, path, tensor)
        if path.exists() and not overwrite:
            raise StorageError(f"{path} was created by another process in the meantime; choose another file")
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}); nothing was left behind; free some space, or "
            "choose a writable folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _header(path: Path, metadata: Mapping[str, Value], tensors: Sequence[NewTensor]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        if key == "general.alignment" and value.value != ALIGNMENT:
            raise StorageError(f"{path}: got general.alignment={value.value}, expected {ALIGNMENT}")
        try:
            parts += [_name(key, MAX_KEY_BYTES), *_value(value)]
        except (ValueError, OverflowError, struct.error) as error:
            raise StorageError(f"{path}: metadata {key[:80]!r} cannot be written: {error}") from error
    offset = 0
    for tensor in tensors:
        try:
            if not 1 <= len(tensor.shape) <= MAX_DIMENSIONS or min(tensor.shape) < 1:
                raise ValueError(
                    f"got shape {list(tensor.shape)}, expected 1 to {MAX_DIMENSIONS} positive sizes"
                )
            parts += [
                _name(tensor.name, MAX_NAME_BYTES),
                struct.pack("<I", len(tensor.shape)),
                struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)),
                struct.pack("<IQ", tensor.type.id, offset),
            ]
            offset += tensor.type.nbytes(tensor.shape)
        except ValueError as error:
            raise StorageError(f"{path}: tensor {tensor.name!r} cannot be written: {error}") from error
        offset += -offset % ALIGNMENT
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise StorageError(f"{path}: two tensors have one name; expected distinct names")
    return b"".join(parts)


def _write_tensor(file: BinaryIO, path: Path, tensor: NewTensor) -> None:
    try:
        content = tensor.content()
    except ValueError as error:
        raise StorageError(f"{path}: tensor {tensor.name!r} cannot be written: {error}") from error
    nbytes = tensor.type.nbytes(tensor.shape)
    if content.dtype != np.uint8 or content.shape != (nbytes,):
        raise StorageError(
            f"{path}: tensor {tensor.name!r} has the content {content.dtype}{list(content.shape)}, expected "
            f"uint8[{nbytes}] for {tensor.type.name}{list(tensor.shape)}"
        )
    file.write(np.ascontiguousarray(content).data)
    file.write(b"\0" * (-len(content) % ALIGNMENT))


def _name(text: str, most: int) -> bytes:
    content = text.encode()
    if not 0 < len(content) <= most:
        raise ValueError(f"the name has {len(content)} bytes, expected 1 to {most}")
    return struct.pack("<Q", len(content)) + content


def _value(value: Value) -> list[bytes]:
    """Type and content of a metadata value. Raises ValueError, OverflowError: the kind cannot hold it."""
    kind = value.kind.removesuffix("[]")
    if kind not in KINDS or kind == "array":
        raise ValueError(
            f"got the kind {value.kind!r}, expected one of {', '.join(DTYPES)} or string, with or without []"
        )
    number = struct.pack("<I", KINDS.index(kind))
    items = value.value if value.kind.endswith("[]") else [value.value]
    if kind == "string":
        strings = [item.encode("utf-8", "surrogateescape") for item in items]
        content = [part for text in strings for part in (struct.pack("<Q", len(text)), text)]
    else:
        array = np.asarray(items)
        if array.size and kind[0] in "ui" and not np.array_equal(array.astype(DTYPES[kind]), array):
            raise ValueError(f"got a number that {kind} does not hold")
        content = [array.astype(DTYPES[kind]).tobytes()]
    if not value.kind.endswith("[]"):
        return [number, *content]
    return [struct.pack("<I", KINDS.index("array")), number, struct.pack("<Q", len(items)), *content]
