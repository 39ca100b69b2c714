"""Executing a Python file given by the user (a config, a study), with one-line errors that give file and line.

The file runs with the user's permissions. Load only trusted files.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

LARGEST_BYTES = 2**20  # no settings file is larger than this


def load_python_file(file: Path) -> types.ModuleType:
    """Execute a file as a module named after it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a directory, pipe or device, a file larger than LARGEST_BYTES, or any error raised by the file, as
        one line that begins with `file:line`.
    """
    if not file.exists():
        raise FileNotFoundError(f"got {file}, expected a Python file; there is no such file")
    if not file.is_file():  # opening a pipe could block forever
        raise ValueError(f"got {file}, expected a regular Python file, not a folder, pipe or device")
    if (size := file.stat().st_size) > LARGEST_BYTES:
        raise ValueError(f"got {file} of {size:,} bytes, expected a Python file of at most {LARGEST_BYTES:,}")
    module = types.ModuleType(f"_file_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look up the module of their class by name
    with one_line_errors(file):
        exec(compile(file.read_bytes(), str(file), "exec", dont_inherit=True), module.__dict__)
    return module


@contextlib.contextmanager
def one_line_errors(file: Path) -> Iterator[None]:
    """Convert any exception raised by code of `file` to a one-line ValueError `file:line: type: message`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        is_syntax = isinstance(error, SyntaxError) and error.filename == str(file)
        message = error.msg if is_syntax else str(error)  # type: ignore[union-attr]  # a SyntaxError has msg
        line = error.lineno if is_syntax else _line(file, error)  # type: ignore[union-attr]
        place = f"{file}:{line}" if line else str(file)
        raise ValueError(f"{place}: {type(error).__name__}: {' '.join(str(message).split())}") from error


def _line(file: Path, error: BaseException) -> int | None:
    """Line number of the innermost frame in `file`."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), None)
