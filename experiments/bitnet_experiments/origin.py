"""Where rows come from: rows that are compared are measured on one kind of machine, by one state of the code.

`origin` is recorded in every row. Its `code` is a hash of the source files that decide what a run does: the three
packages, the C++ sources of a checkout, and study.py if it defines `run` (otherwise the settings determine the run).
Commits that add results or documentation therefore do not change it. It ends in `-dirty` if one of these files has
uncommitted changes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bitnet_experiments.provenance import provenance
from bitnet_experiments.study import Row, Study

PACKAGES = ("bitnet_jax", "bitnet_kernels", "bitnet_experiments")
SOURCES = (".py", ".cc", ".h")
ORIGIN = ("code", "hardware", "python", "jax")
DIRTY = "-dirty"


def origin(study: Study | None = None) -> dict[str, str]:
    """The fields ORIGIN, and the commit, of what runs here and now."""
    return provenance() | {"code": code(study)}


def code(study: Study | None = None) -> str:
    """12 hex digits that identify the source files of the packages, and those of the study where they matter."""
    digest, dirty = _packages()
    if study is not None and study.run is not None:
        own = (study.folder / "study.py").read_bytes()
        digest = hashlib.sha256(digest.encode() + own).hexdigest()
        dirty = dirty or (study.committed and _changed([study.folder / "study.py"]))
    return digest[:12] + DIRTY * dirty


def origin_here(study: Study) -> dict[str, str]:
    """`origin` without the hardware: it starts no accelerator, which would keep it from the runs of other processes."""
    return {
        "code": code(study),
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
    }


@functools.cache  # of the code that this process runs, whatever happens to the files later
def _packages() -> tuple[str, bool]:
    folders = [_folder(name) for name in PACKAGES]
    csrc = folders[1].with_name("csrc")
    folders += [csrc] if csrc.is_dir() else []
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.suffix in SOURCES:
                digest.update(f"{folder.name}/{file.relative_to(folder).as_posix()}\n".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest(), _changed(folders)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]).resolve()


def _changed(paths: list[Path]) -> bool:
    """Whether git knows of changes, or new files, at these paths; False outside a checkout."""
    command = ["git", "status", "--porcelain", "--", *map(str, paths)]
    try:
        return bool(subprocess.run(command, cwd=_folder(PACKAGES[0]), capture_output=True).stdout.strip())
    except OSError:  # no git
        return False


def recorded(row: Row) -> dict[str, Any]:
    """The origin recorded in a row; rows without `code` are known by their commit alone."""
    return {"code": f"commit {row.get('commit')}"} | {name: row[name] for name in ORIGIN if name in row}


def same_origin(row: Row, here: Mapping[str, str]) -> bool:
    """Whether a row agrees with `here` in all fields of ORIGIN that `here` has."""
    there = recorded(row)
    return all(there.get(name) == here[name] for name in ORIGIN if name in here)


def check_one_origin(rows: Iterable[Row], here: Mapping[str, str], file: Path) -> None:
    """Raises ValueError if rows that stay in `file` come from elsewhere than those to be added."""
    others = [row for row in rows if not same_origin(row, here)]
    if not others:
        return
    there = recorded(others[0])
    differing = [name for name in ORIGIN if name in here and there.get(name) != here[name]]
    apart = "; ".join(f"{name} {there.get(name)}, now {here[name]}" for name in differing)
    raise ValueError(
        f"{file}: got {len(others)} rows of another origin ({apart}), expected rows that are compared to have one; "
        "measure them again with --again, or add to them with --mix"
    )


def origin_text(row: Row) -> str:
    """`commit, code, versions, hardware` of a row in words."""
    known = {"commit": row.get("commit")} | {name: row[name] for name in ORIGIN if name in row}
    named = [f"{name} {known[name]}" for name in ("commit", "code", "jax", "python") if name in known]
    return ", ".join([*named, str(known.get("hardware"))])
