"""The default corpus: the source text of the running Python's standard library.

Real text (code, prose in docstrings, tables), about 10 MB, available on every machine without a download. Files
that vary between machines with the same Python version are excluded: installed packages, the build configuration of
the interpreter, and the test folders, which some distributions strip.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")  # generated when this interpreter was built


def folder() -> Path:
    """The standard library folder of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(root: Path) -> list[Path]:
    """The .py files of the corpus, sorted by their path relative to `root`."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in EXCLUDED_FOLDERS and not name.startswith(EXCLUDED_PREFIXES)
        ]
        found += [
            Path(parent, name)
            for name in names
            if name.endswith(".py") and not name.startswith(EXCLUDED_PREFIXES)
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
