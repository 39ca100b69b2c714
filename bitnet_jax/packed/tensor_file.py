"""A safetensors file whose tensors all start at multiples of 64 bytes: written in one pass, read by one memory map.

    8 bytes   length of the header, little endian
    header    JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__": str -> str;
              padded with spaces, so that the data starts at a multiple of 64
    data      the tensors, contiguous, as the format requires

A tensor that would leave the next one unaligned is followed by a uint8 tensor `__pad.N` of zeros, so any safetensors
reader can read the file. Alignment lets `jax.device_put` use a view of the map without a copy. The metadata entry
`crc32`, a JSON table, has the checksum of every tensor except the pads.

A tensor may be `Streamed`: produced in chunks while it is written, so that a file may be larger than memory.

Reading trusts nothing: every number in the header is checked against the file before it is used. Third-party files,
which are not aligned, are read with `aligned=False`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

ALIGNMENT = 64  # bytes: a cache line, an AVX-512 vector, and what XLA requires of a buffer it adopts
PAD = "__pad."
PIECE_BYTES = 4 << 20  # small enough to be in cache for both the checksum and the write
MAX_HEADER_BYTES = 100_000_000  # the limit of the official readers
DTYPES: dict[str, np.dtype] = {
    "U8": np.dtype(np.uint8),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
FOREIGN_DTYPES = DTYPES | {"I64": np.dtype(np.int64)}  # also read, in files of others
MESSAGE_LIMIT = 1000
RESTORE = "restore the file or make it again"


class StorageError(ValueError):
    """A model file or folder is damaged, incomplete or of another kind, or cannot be written.

    The message is one printable line of at most MESSAGE_LIMIT characters, whatever a damaged file contains.
    """

    def __init__(self, message: str) -> None:
        printable = "".join(c if c.isprintable() else " " for c in message[: 2 * MESSAGE_LIMIT])
        super().__init__(" ".join(printable.split())[:MESSAGE_LIMIT])


class TensorFile(NamedTuple):
    """Tensors are read-only views of the memory map, without pads; their contents are not read yet."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    mapped: mmap.mmap

    def release(self) -> None:
        """Stops counting what was read so far as memory of this process: what is needed again comes from the system's
        file cache. Does nothing on systems without madvise."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A tensor that is never in memory as a whole: `chunks`, iterated once, yields its elements in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Iterable[np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    file: BinaryIO,
    tensors: Mapping[str, np.ndarray | Streamed],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    aligned: bool = True,
) -> None:
    """Writes all tensors in the given order, and `metadata` with the entry `crc32` added.

    Args:
      file: empty and seekable: the header, which contains the checksums, is written last.
      aligned: False writes no pads, for readers that take every tensor for a part of the model.
      on_bytes: called with the number of bytes of each piece written, for a progress bar.

    Raises:
      StorageError: a tensor has a dtype outside DTYPES, no elements, or a reserved name; or the chunks of a streamed
        one do not match its shape and dtype.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in names or not tensor.nbytes or name == "__metadata__" or name.startswith(PAD):
            raise StorageError(
                f"{name}: got {tensor.dtype}{list(tensor.shape)}, expected one of {', '.join(DTYPES)}, "
                f"not empty, with a name other than __metadata__ and {PAD}N"
            )
        begin, end = end, end + tensor.nbytes
        offsets = {"shape": list(tensor.shape), "data_offsets": [begin, end]}
        entries[name] = {"dtype": names[tensor.dtype], **offsets}
        if (pad := -end % ALIGNMENT) and aligned:
            begin, end = end, end + pad
            entries[f"{PAD}{len(entries)}"] = {"dtype": "U8", "shape": [pad], "data_offsets": [begin, end]}

    def header(crc32: Mapping[str, int]) -> bytes:
        strings = {**metadata, "crc32": json.dumps(crc32)}
        return json.dumps({"__metadata__": strings, **entries}, separators=(",", ":")).encode()

    # Reserve room for the longest checksums; the real ones are known after the data is written.
    length = len(header(dict.fromkeys(tensors, 2**32 - 1)))
    length += -(8 + length) % ALIGNMENT
    file.write(length.to_bytes(8, "little") + b" " * length)
    crc32 = {}
    for name, tensor in tensors.items():
        crc32[name] = 0
        for piece in _pieces(name, tensor):
            crc32[name] = zlib.crc32(piece, crc32[name])
            file.write(piece)
            on_bytes(len(piece))
        if aligned:
            file.write(b"\0" * (-tensor.nbytes % ALIGNMENT))
    file.seek(8)
    file.write(header(crc32).ljust(length))


def _pieces(name: str, tensor: np.ndarray | Streamed) -> Iterator[memoryview]:
    """The bytes of a tensor, PIECE_BYTES at a time."""
    count = 0
    for chunk in tensor.chunks if isinstance(tensor, Streamed) else (tensor,):
        if chunk.dtype != tensor.dtype:
            raise StorageError(f"{name}: got a chunk of {chunk.dtype}, expected {tensor.dtype}")
        # Through uint8: bfloat16 has no buffer protocol.
        content = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        count += len(content)
        for begin in range(0, len(content), PIECE_BYTES):
            yield content[begin : begin + PIECE_BYTES]
    if count != tensor.nbytes:
        raise StorageError(f"{name}: got chunks of {count} bytes in total, expected {tensor.nbytes}")


def read(path: Path, *, aligned: bool = True) -> TensorFile:
    """Memory-maps a file made by `write` or, with aligned=False, any safetensors file.

    Raises:
      StorageError: the file cannot be read, is truncated, or its header does not describe its bytes exactly.
    """
    try:
        size = path.stat().st_size
        if size < 8:
            raise StorageError(f"{path}: got {size} bytes, expected a header; {RESTORE}")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(mapped, np.uint8)
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); {RESTORE}") from error
    size = data.size  # the size that was mapped: the file may have changed since stat
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise StorageError(
            f"{path}: its header claims {length} bytes, expected at most {min(size - 8, MAX_HEADER_BYTES)} "
            f"in a file of {size}; {RESTORE}"
        )
    if aligned and (8 + length) % ALIGNMENT:
        raise StorageError(
            f"{path}: data starts at byte {8 + length}, expected a multiple of {ALIGNMENT}; "
            "this is not a packed model of bitnet_jax"
        )
    header = parse_json(data[8 : 8 + length].tobytes(), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StorageError(f"{path}: __metadata__ is not a table of strings; {RESTORE}")

    dtypes = DTYPES if aligned else FOREIGN_DTYPES
    tensors: dict[str, np.ndarray] = {}
    available, end = size - 8 - length, 0
    for name, entry in sorted(
        _checked_entries(header, path, dtypes), key=lambda item: item[1]["data_offsets"]
    ):
        begin, stop = entry["data_offsets"]
        dtype, shape = dtypes[entry["dtype"]], entry["shape"]
        nbytes, is_pad = math.prod(shape) * dtype.itemsize, name.startswith(PAD)
        if begin != end or stop - begin != nbytes or (aligned and begin % ALIGNMENT and not is_pad):
            rule = f", a multiple of {ALIGNMENT}" if aligned else ""
            raise StorageError(
                f"{path}: {name[:80]} of {entry['dtype']}{shape} is at [{begin}, {stop}), "
                f"expected {nbytes} bytes from {end}{rule}; {RESTORE}"
            )
        if stop > available:
            raise StorageError(
                f"{path}: {name[:80]} ends at byte {stop} of {available}: the file is truncated; {RESTORE}"
            )
        end = stop
        tensor = data[8 + length + begin : 8 + length + stop]
        if not is_pad:
            tensors[name] = tensor.view(dtype).reshape(shape)
        elif tensor.any():
            raise StorageError(f"{path}: {name[:80]} is not zero; {RESTORE}")
    if end != available:
        raise StorageError(
            f"{path}: {available - end} bytes follow the last tensor, expected none; {RESTORE}"
        )
    return TensorFile(tensors, metadata, mapped)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys and without NaN.

    Raises:
      StorageError: anything else.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key is repeated")
        return dict(pairs)

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=table, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error}); {RESTORE}") from error
    if not isinstance(parsed, dict):
        raise StorageError(f"{path}: got a JSON {type(parsed).__name__}, expected an object; {RESTORE}")
    return parsed


def _checked_entries(
    header: dict[str, Any], path: Path, dtypes: dict[str, np.dtype]
) -> list[tuple[str, dict[str, Any]]]:
    """The entries of the header, each checked to have a known dtype, a positive shape and non-negative offsets."""

    def naturals(value: Any, lowest: int) -> bool:
        return isinstance(value, list) and all(type(number) is int and number >= lowest for number in value)

    for name, entry in header.items():
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"dtype", "shape", "data_offsets"}
            or not isinstance(entry["dtype"], str)
            or entry["dtype"] not in dtypes
            or not naturals(entry["shape"], 1)
            or len(entry["shape"]) > 8
            or not naturals(entry["data_offsets"], 0)
            or len(entry["data_offsets"]) != 2
        ):
            raise StorageError(
                f"{path}: tensor {name[:80]!r} is described by {str(entry)[:120]}, expected a dtype in "
                f"{', '.join(dtypes)}, a shape and two data_offsets; {RESTORE}"
            )
    return list(header.items())
