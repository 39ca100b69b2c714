"""A safetensors file whose tensors all start at multiples of 64 bytes: written in one pass, read by one map.

    8 bytes   length of the header, little endian
    header    JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__": str -> str;
              spaces behind it, so that the data starts at a multiple of 64
    data      the tensors, one after the other without holes, as the format demands

What would leave the next tensor unaligned is followed by a uint8 tensor `__pad.N` of zeros, so any
safetensors reader can read the file. Alignment is what lets `jax.device_put` take a view of the map without a
copy. The entry `crc32` of the metadata, a JSON table, has the checksum of every tensor but the pads.

A tensor may be `Streamed`: made piece by piece while it is written, so that a file may be larger than memory.

Reading trusts nothing: every number of the header is checked against the file before it is used. Files of
other people, which align nothing, are read by the same code with `aligned=False`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

ALIGNMENT = 64  # bytes: a cache line, an AVX-512 vector, and what XLA asks of a buffer it takes over
PAD = "__pad."
PIECE_BYTES = 4 << 20  # checksum, then write, while a piece is in the cache
MAX_HEADER_BYTES = 100_000_000  # the limit of the official readers
DTYPES: dict[str, np.dtype] = {
    "U8": np.dtype(np.uint8),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MESSAGE_LIMIT = 1000
RESTORE = "restore the file or make it again"


class StorageError(ValueError):
    """A model file or folder is damaged, incomplete or not ours, or cannot be written.

    The message is one printable line of at most MESSAGE_LIMIT characters, whatever a damaged file put into it.
    """

    def __init__(self, message: str) -> None:
        printable = "".join(c if c.isprintable() else " " for c in message[: 2 * MESSAGE_LIMIT])
        super().__init__(" ".join(printable.split())[:MESSAGE_LIMIT])


class TensorFile(NamedTuple):
    """Tensors are read-only views of the memory map, pads left out; nothing of them has been read yet."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A tensor that nobody holds whole: `chunks`, iterated once, gives its elements in C order."""

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
) -> None:
    """Writes all tensors in the given order, and `metadata` with the entry `crc32` added.

    Args:
      file: empty, and one that can seek: the header, which holds the checksums, is written last.
      on_bytes: is told the bytes of each piece that was written, for a progress bar.

    Raises:
      StorageError: a tensor has a dtype outside DTYPES, no elements, or a name that is reserved; or the chunks
        of a streamed one are not what its shape and dtype say.
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
        if hole := -end % ALIGNMENT:
            begin, end = end, end + hole
            entries[f"{PAD}{len(entries)}"] = {"dtype": "U8", "shape": [hole], "data_offsets": [begin, end]}

    def header(crc32: Mapping[str, int]) -> bytes:
        told = {**metadata, "crc32": json.dumps(crc32)}
        return json.dumps({"__metadata__": told, **entries}, separators=(",", ":")).encode()

    # Room for the longest checksums; the real ones are known when the data is written.
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
        file.write(b"\0" * (-tensor.nbytes % ALIGNMENT))
    file.seek(8)
    file.write(header(crc32).ljust(length))


def _pieces(name: str, tensor: np.ndarray | Streamed) -> Iterator[memoryview]:
    """The bytes of a tensor, some MiB at a time."""
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
        raise StorageError(f"{name}: its chunks have {count} bytes, expected {tensor.nbytes}")


def read(path: Path, *, aligned: bool = True) -> TensorFile:
    """Maps a file that `write` made or, with aligned=False, any safetensors file.

    Raises:
      StorageError: the file cannot be read, is truncated, or its header does not describe exactly its bytes.
    """
    try:
        size = path.stat().st_size
        if size < 8:
            raise StorageError(f"{path}: got {size} bytes, expected a header; {RESTORE}")
        data = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); {RESTORE}") from error
    size = data.size  # of what was mapped, should the file have changed in between
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

    tensors: dict[str, np.ndarray] = {}
    available, end = size - 8 - length, 0
    for name, entry in sorted(_checked_entries(header, path), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        nbytes, is_pad = math.prod(shape) * dtype.itemsize, name.startswith(PAD)
        if begin != end or stop - begin != nbytes or (aligned and begin % ALIGNMENT and not is_pad):
            rule = f", a multiple of {ALIGNMENT}" if aligned else ""
            raise StorageError(
                f"{path}: {name[:80]} of {entry['dtype']}{shape} lies at [{begin}, {stop}), "
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
    return TensorFile(tensors, metadata)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys and without NaN.

    Raises:
      StorageError: it is anything else.
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


def _checked_entries(header: dict[str, Any], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The entries of the header, each with a known dtype, a shape and offsets that are natural numbers."""

    def naturals(value: Any, lowest: int) -> bool:
        return isinstance(value, list) and all(type(number) is int and number >= lowest for number in value)

    for name, entry in header.items():
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"dtype", "shape", "data_offsets"}
            or not isinstance(entry["dtype"], str)
            or entry["dtype"] not in DTYPES
            or not naturals(entry["shape"], 1)
            or len(entry["shape"]) > 8
            or not naturals(entry["data_offsets"], 0)
            or len(entry["data_offsets"]) != 2
        ):
            raise StorageError(
                f"{path}: tensor {name[:80]!r} is described by {str(entry)[:120]}, expected a dtype out of "
                f"{', '.join(DTYPES)}, a shape and two data_offsets; {RESTORE}"
            )
    return list(header.items())
