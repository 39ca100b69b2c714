"""Files of others, read with care: regular files only, within stated limits, with errors of one line.

    unpacked bytes of a .gz file   64 MiB and 200 times the packed bytes read so far: text packs 3 to 20 times, a
                                   bomb 1000 times. $BITNET_JAX_MAX_FILE_BYTES sets another limit in place of it.
    bytes of a line                64 MiB, or $BITNET_JAX_MAX_LINE_BYTES: of files of lines, a plain text may be one

Until a limit is reached memory does not depend on what a file pretends to hold.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_jax.data.errors import DataError, one_line

FILE_VARIABLE, LINE_VARIABLE = "BITNET_JAX_MAX_FILE_BYTES", "BITNET_JAX_MAX_LINE_BYTES"
UNPACKED_BYTES, UNPACKED_RATIO = 1 << 26, 200
LINE_BYTES = 1 << 26
JSON_BYTES = 1 << 28  # of a tokenizer.json or another file that is one JSON value: far above any real one
BLOCK = 1 << 20


def check_regular(path: Path) -> None:
    """Raises DataError for a pipe, a device or a socket, which is never opened: reading could block for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({one_line(error)}); check the file and its permissions"
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISDIR: "a folder", stat.S_ISSOCK: "a socket"}
        kind = next((name for test, name in kinds.items() if test(mode)), "a device")
        raise DataError(f"{path}: got {kind}, expected a regular file; copy what it gives into one")


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content in blocks of up to BLOCK bytes, unpacked where the name ends in .gz.

    Raises:
      DataError: no regular file, unreadable, damaged, or beyond the limit.
    """
    check_regular(path)
    packed, unpacked = path.suffix == ".gz", 0
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
                        f"{path}: got more than {allowed} bytes out of {raw.tell()} packed ones, expected a file that "
                        f"unpacks to less; if it is sound, set {FILE_VARIABLE} to the bytes it may unpack to"
                    )
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: got damaged gzip data ({one_line(error)}) behind {unpacked} unpacked bytes, expected a whole .gz "
            "file; copy it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({one_line(error)}); check the file and its permissions"
        ) from error


def read_file(path: Path, limit: int | None = None) -> bytes:
    """The whole content, unpacked where the name ends in .gz. Raises DataError, also beyond `limit` bytes."""
    blocks, size = [], 0
    for block in read_blocks(path):
        blocks.append(block)
        size += len(block)
        if limit is not None and size > limit:
            raise DataError(
                f"{path}: got more than {limit} bytes, expected fewer; is this the file you mean?"
            )
    return b"".join(blocks)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends, one after the other. Raises DataError, see `read_blocks`."""
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
                f"{path}:{number}: got a line of more than {longest} bytes, expected shorter ones; if it is sound, set "
                f"{LINE_VARIABLE} to the bytes a line may have"
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
    """UTF-8 text. Raises DataError with the place of the first byte that is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: got byte 0x{content[error.start]:02x} at offset {error.start}, expected UTF-8 text; "
            "convert the file (iconv -t UTF-8) or take it out"
        ) from error


def parse_json(text: str, where: str, expected: str) -> Any:
    """The value of a JSON text. Raises DataError: damaged, nested too deep, or a number of too many digits."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: got damaged JSON ({one_line(error)}), expected {expected}") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise DataError(f"{where}: got JSON that cannot be read ({one_line(error)})") from error
