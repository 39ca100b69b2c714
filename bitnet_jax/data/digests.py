"""What files contain, known without reading them again.

The SHA-256 of a file is remembered with its size, its times of modification and change and its inode, as in the index
of git: while these are the same, so is the content. A file that changed within RACY_SECONDS before it was read is not
remembered, since a later change might leave its times as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.files import BLOCK, check_regular
from bitnet_jax.progress import Progress, progress_bar

RACY_SECONDS = 2.0
Signature = list[int]


@dataclass(frozen=True)
class Contents:
    """The content of files at one moment."""

    digest: str  # of the names and contents of all files, in order
    signatures: dict[Path, Signature]

    def check_unchanged(self) -> None:
        """Raises DataError if a file is no longer the one whose content was found."""
        for path, signature in self.signatures.items():
            if _signature(path) != signature:
                raise DataError(f"{path}: it changed while it was read; start again when it is complete")


def contents(files: Sequence[tuple[str, Path]], remembered: Path | None) -> Contents:
    """The content of named files.

    Args:
      remembered: the file that keeps what is known about these files from one call to the next; None: nothing is kept.
    """
    known = _load(remembered)
    found: dict[str, tuple[Signature, str]] = {}
    signatures = {path: _signature(path) for _, path in files}
    missing = {
        path for path, signature in signatures.items() if known.get(str(path), ([], ""))[0] != signature
    }
    whole, changed = hashlib.sha256(), False
    total = sum(signatures[path][0] for path in missing)
    with progress_bar(total, unit="B", description="reading", delay=1.0) as progress:
        for name, path in files:
            signature = signatures[path]
            if path in missing:
                began = time.time_ns()
                digest = _file_digest(path, progress)
                if began - max(signature[1:3]) > RACY_SECONDS * 1e9:
                    found[str(path)], changed = (signature, digest), True
            else:
                _, digest = found[str(path)] = known[str(path)]
            whole.update(json.dumps([name, digest]).encode())
    result = Contents(whole.hexdigest(), signatures)
    result.check_unchanged()
    if remembered is not None and changed:
        _save(remembered, found)
    return result


def _signature(path: Path) -> Signature:
    try:
        status = path.stat()
    except OSError:
        return [0, 0, 0, 0]
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _file_digest(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    try:
        check_regular(path)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                progress.update(len(block))
    except (OSError, DataError) as error:
        return f"unreadable: {error}"  # whether that matters is decided where documents are read
    return digest.hexdigest()


def _load(path: Path | None) -> dict[str, tuple[Signature, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return {str(name): (list(signature), str(digest)) for name, (signature, digest) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(path: Path, found: dict[str, tuple[Signature, str]]) -> None:
    """Replaces the file. What cannot be kept is found again the next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(found, file)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
