"""Safe reading of untrusted files: regular files only, within limits, with one-line errors.

    unpacked bytes of a .gz file   64 MiB plus 200 times the packed bytes read so far: text compresses 3 to 20 times,
                                   a zip bomb 1000 times. $BITNET_JAX_MAX_FILE_BYTES replaces this limit.
    bytes of a line                64 MiB, or $BITNET_JAX_MAX_LINE_BYTES; applies to files read by line only

Memory use never depends on the size that a file claims to have.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from bitnet_jax.data.errors import DataError, one_line

FILE_VARIABLE, LINE_VARIABLE = "BITNET_JAX_MAX_FILE_BYTES", "BITNET_JAX_MAX_LINE_BYTES"
UNPACKED_BYTES, UNPACKED_RATIO = 1 << 26, 200
LINE_BYTES = 1 << 26
JSON_BYTES = 1 << 28  # of a tokenizer.json or another file that is one JSON value: far above any real one
BLOCK = 1 << 20

_REPORT: ContextVar[Callable[[int], object] | None] = ContextVar("report", default=None)


@contextlib.contextmanager
def report_reads(report: Callable[[int], object] | None) -> Iterator[None]:
    """In the body, every block read from a file is reported: its bytes in the file, packed if that is."""
    token = _REPORT.set(report)
    try:
        yield
    finally:
        _REPORT.reset(token)


def report_read(count: int) -> None:
    """Reports `count` bytes of a file that were read in another way than by `read_blocks`."""
    if (report := _REPORT.get()) is not None:
        report(count)


def check_regular(path: Path) -> None:
    """Raise DataError unless the path is a regular file; reading a pipe, device or socket could block forever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({one_line(error)}); check the file and its permissions"
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISDIR: "a folder", stat.S_ISSOCK: "a socket"}
        kind = next((name for test, name in kinds.items() if test(mode)), "a device")
        raise DataError(f"{path}: got {kind}, expected a regular file; copy its content into one")


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content in blocks of up to BLOCK bytes, unpacked if the name ends in .gz.

    Raises:
      DataError: not a regular file, unreadable, damaged, or beyond the limit.
    """
    check_regular(path)
    packed, unpacked, reported = path.suffix == ".gz", 0, 0
    limit = _limit(FILE_VARIABLE)
    try:
        with contextlib.ExitStack() as stack:
            raw: Any = stack.enter_context(path.open("rb"))
            file: Any = stack.enter_context(gzip.GzipFile(fileobj=raw)) if packed else raw
            while block := file.read1(BLOCK) if packed else file.read(BLOCK):
                unpacked += len(block)
                allowed = UNPACKED_BYTES + UNPACKED_RATIO * raw.tell() if limit is None else limit
                if packed and unpacked > allowed:
                    raise DataError(
                        f"{path}: got more than {allowed} bytes unpacked from {raw.tell()}, expected fewer; if the "
                        f"file is trusted, set {FILE_VARIABLE} to a larger number"
                    )
                report_read(raw.tell() - reported)
                reported = raw.tell()
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: got damaged gzip data ({one_line(error)}) after {unpacked} unpacked bytes, expected a complete "
            ".gz file; copy it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({one_line(error)}); check the file and its permissions"
        ) from error


def read_file(path: Path, limit: int | None = None) -> bytes:
    """The whole content, unpacked if the name ends in .gz. Raises DataError, also beyond `limit` bytes."""
    blocks, size = [], 0
    for block in read_blocks(path):
        blocks.append(block)
        size += len(block)
        if limit is not None and size > limit:
            raise DataError(
                f"{path}: got more than {limit} bytes, expected fewer; check that this is the right file"
            )
    return b"".join(blocks)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its newline) pairs. Raises DataError, see `read_blocks`."""
    longest = _limit(LINE_VARIABLE) or LINE_BYTES
    number, pieces, size = 1, list[bytes](), 0
    for block in read_blocks(path):
        *ended, rest = block.split(b"\n")
        for piece in ended:
            yield number, b"".join([*pieces, piece, b"\n"])
            number, pieces, size = number + 1, [], 0
        pieces.append(rest)
        size += len(rest)
        if size > longest:
            raise DataError(
                f"{path}:{number}: got a line of more than {longest} bytes, expected a shorter one; if the file is "
                f"trusted, set {LINE_VARIABLE} to a larger number"
            )
    if size:
        yield number, b"".join(pieces)


def _limit(variable: str) -> int | None:
    value = os.environ.get(variable)
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise DataError(
            f"${variable}: got {value[:40]!r}, expected a number of bytes, at least 1; correct it"
        )
    return int(value)


def decode(content: bytes, where: str) -> str:
    """UTF-8 text. Raises DataError with the offset of the first invalid byte."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise invalid_utf8(content, error.start, where) from error


def invalid_utf8(content: bytes, at: int, where: str, before: int = 0) -> DataError:
    """The error for the byte `content[at]`; `before` bytes of the file come before the content."""
    return DataError(
        f"{where}: got byte 0x{content[at]:02x} at offset {before + at}, expected UTF-8 text; "
        "convert the file (iconv -t UTF-8) or remove it"
    )


def parse_json(text: str, where: str, expected: str) -> Any:
    """Parse JSON. Raises DataError: damaged, nested too deeply, or a number with too many digits."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: got damaged JSON ({one_line(error)}), expected {expected}") from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise DataError(f"{where}: got JSON that cannot be read ({one_line(error)})") from error
