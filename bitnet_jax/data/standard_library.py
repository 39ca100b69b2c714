"""The default corpus: the source text of the running Python's standard library.

Real text (code, prose in docstrings, tables), about 10 MB, present on every machine without a download. What
differs from machine to machine under one Python version is left out: installed packages, the record of how
this interpreter was built, and the test folders, which some distributions strip.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")  # generated when this interpreter was built


def folder() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(root: Path) -> list[Path]:
    """The .py files that make the corpus, sorted by their path below `root`."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in LEFT_OUT_FOLDERS and not name.startswith(LEFT_OUT_PREFIXES)
        ]
        found += [
            Path(parent, name)
            for name in names
            if name.endswith(".py") and not name.startswith(LEFT_OUT_PREFIXES)
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
