"""The container GGUF, versions 2 and 3, little endian: metadata and tensors, read by one memory map.

    4 bytes   "GGUF", then version u32, number of tensors u64, number of metadata entries u64
    metadata  key, type u32, value; a string is its length u64 and its bytes, an array its type u32, length u64, values
    tensors   name, number of dimensions u32, dimensions u64 (innermost first), type u32, offset u64
    data      in the listed order; it and each tensor start at a multiple of `general.alignment` (by default 32)

Reading trusts nothing: every number is checked against the file before it is used, so that no file makes it allocate
more than a small multiple of the file's size. Tensors are views of the memory map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitnet_jax.interop.gguf_types import TensorType, tensor_type
from bitnet_jax.packed.tensor_file import RESTORE, StorageError

MAGIC = b"GGUF"
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MAX_STRINGS = 1 << 24  # of an array: 30 times the longest list of merges

# Types of metadata values, in the order of their numbers in the file.
KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")
DTYPES = {
    kind: np.dtype("?" if kind == "bool" else f"<{kind[0]}{int(kind[1:]) // 8}")
    for kind in KINDS
    if kind not in ("string", "array")
}


class Value(NamedTuple):
    """A metadata value: `kind` is u8 ... f64, bool or string, followed by [] for an array.

    Strings are str; bytes that are not UTF-8, as some vocabularies hold, are surrogate escapes.
    """

    kind: str
    value: Any  # int, float, bool or str; of an array: np.ndarray, or list[str]


class Tensor(NamedTuple):
    type: TensorType
    shape: tuple[int, ...]  # outermost first: [outputs, inputs]
    data: np.ndarray  # uint8 [nbytes], a read-only view of the file


class GgufFile(NamedTuple):
    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]


def read(path: str | Path) -> GgufFile:
    """Memory-maps a GGUF file; no tensor is read yet.

    Raises:
      StorageError: the file cannot be read, is truncated, big-endian or of another version, holds a tensor type that is
        not supported, or contradicts itself. The message names the field.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise StorageError(f"{path} is not a file; expected a .gguf file")
        if path.stat().st_size < 24:
            raise StorageError(f"{path}: got {path.stat().st_size} bytes, expected a GGUF header; {RESTORE}")
        data = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); {RESTORE}") from error
    try:
        return _parse(path, data)
    except ValueError as error:
        advice = "" if "; " in str(error) else f"; {RESTORE}"
        raise StorageError(f"{path}: {error}{advice}") from error


class _Cursor:
    """Reads numbers and strings from the start of a file; ValueError beyond its end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.bytes = memoryview(data.data)
        self.at = 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.bytes) - self.at:
            raise ValueError(
                f"{what} needs {count} bytes at {self.at}, expected at most {len(self.bytes) - self.at}: "
                "the file is truncated or damaged"
            )
        self.at += count
        return self.bytes[self.at - count : self.at]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, most: int | None = None) -> bytes:
        length = self.u64(what)
        if most is not None and not 0 < length <= most:
            raise ValueError(f"{what} has {length} bytes, expected 1 to {most}")
        return bytes(self.take(length, what))

    def name(self, what: str, most: int) -> str:
        content = self.string(what, most)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is {content[:40]!r}, expected UTF-8") from error

    def count(self, count: int, smallest: int, what: str) -> int:
        """A number of entries of at least `smallest` bytes, checked to fit."""
        if count * smallest > len(self.bytes) - self.at:
            raise ValueError(
                f"{what} is {count}, expected at most {(len(self.bytes) - self.at) // smallest}, for which bytes follow"
            )
        return count


def _parse(path: Path, data: np.ndarray) -> GgufFile:
    cursor = _Cursor(data)
    if (magic := bytes(cursor.take(4, "the header"))) != MAGIC:
        raise ValueError(f"starts with {magic!r}, expected {MAGIC!r}: this is not a GGUF file")
    version = cursor.u32("version")
    if version not in (2, 3):
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
            raise ValueError(
                "is big-endian, expected little-endian; convert it with gguf-py's gguf_convert_endian"
            )
        raise ValueError(f"has version {version}, expected 2 or 3; convert the model again")
    tensor_count, entry_count = cursor.u64("tensor_count"), cursor.u64("metadata_kv_count")
    cursor.count(entry_count, 8 + 1 + 4 + 1, "metadata_kv_count")
    cursor.count(tensor_count, 8 + 1 + 4 + 8 + 4 + 8, "tensor_count")
    metadata: dict[str, Value] = {}
    for index in range(entry_count):
        key = cursor.name(f"metadata key {index}", MAX_KEY_BYTES)
        if key in metadata:
            raise ValueError(f"metadata key {key[:80]!r} is repeated")
        metadata[key] = _value(cursor, f"metadata {key[:80]!r}")
    alignment = metadata.get("general.alignment", Value("u32", ALIGNMENT))
    if alignment.kind != "u32" or alignment.value < 1 or alignment.value & (alignment.value - 1):
        raise ValueError(f"general.alignment is {alignment}, expected a u32 that is a power of two")
    entries: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
    for index in range(tensor_count):
        name, entry = _entry(cursor, index)
        if name in entries:
            raise ValueError(f"tensor {name!r} is repeated")
        entries[name] = entry
    return GgufFile(path, metadata, _tensors(data, entries, cursor.at, alignment.value))


def _value(cursor: _Cursor, what: str) -> Value:
    kind = _kind(cursor.u32(what), what)
    if kind != "array":
        return Value(
            kind, _string(cursor, what) if kind == "string" else _numbers(cursor, kind, 1, what)[0].item()
        )
    kind = _kind(cursor.u32(what), what)
    if kind == "array":
        raise ValueError(f"{what} is an array of arrays, which no model needs; expected numbers or strings")
    length = cursor.u64(what)
    if kind != "string":
        return Value(f"{kind}[]", _numbers(cursor, kind, length, what))
    if cursor.count(length, 8, f"the length of {what}") > MAX_STRINGS:
        raise ValueError(f"{what} has {length} strings, expected at most {MAX_STRINGS}")
    return Value("string[]", [_string(cursor, what) for _ in range(length)])


def _kind(number: int, what: str) -> str:
    if number >= len(KINDS):
        raise ValueError(f"{what} has the value type {number}, expected 0 to {len(KINDS) - 1}")
    return KINDS[number]


def _string(cursor: _Cursor, what: str) -> str:
    return cursor.string(what).decode("utf-8", "surrogateescape")


def _numbers(cursor: _Cursor, kind: str, count: int, what: str) -> np.ndarray:
    content = cursor.take(count * DTYPES[kind].itemsize, what)
    if kind == "bool" and count and np.frombuffer(content, np.uint8).max() > 1:
        raise ValueError(f"{what} has a boolean other than 0 and 1")
    return np.frombuffer(content, DTYPES[kind]).copy()


def _entry(cursor: _Cursor, index: int) -> tuple[str, tuple[TensorType, tuple[int, ...], int]]:
    """Name of a tensor, and its type, shape and offset."""
    name = cursor.name(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    dimensions = cursor.u32(what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{what} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(what) for _ in range(dimensions))[::-1]
    if not all(0 < size < 2**63 for size in shape):
        raise ValueError(f"{what} has the shape {list(shape)}, expected positive sizes")
    number, offset = cursor.u32(what), cursor.u64(what)
    try:
        return name, (tensor_type(number), shape, offset)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _tensors(
    data: np.ndarray, entries: dict[str, tuple[TensorType, tuple[int, ...], int]], header: int, alignment: int
) -> dict[str, Tensor]:
    start, end = header + -header % alignment, 0
    available = max(0, data.size - start)
    tensors = {}
    for name, (kind, shape, offset) in entries.items():
        try:
            nbytes = kind.nbytes(shape)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from error
        expected = end + -end % alignment
        if offset != expected:
            raise ValueError(
                f"tensor {name!r} of {kind.name}{list(shape)} has the offset {offset}, expected {expected}, where the "
                "previous one ends"
            )
        if nbytes > available - offset:
            raise ValueError(
                f"tensor {name!r} of {kind.name}{list(shape)} ends at byte {offset + nbytes} of {available}: "
                "the file is truncated"
            )
        end = offset + nbytes
        tensors[name] = Tensor(kind, shape, data[start + offset : start + end])
    if available - end >= alignment:
        raise ValueError(f"{available - end} bytes follow the last tensor, expected less than {alignment}")
    return tensors
