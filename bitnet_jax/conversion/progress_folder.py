"""What an interrupted conversion has finished: one file per block, and what they belong to.

conversion.json             the subject: everything that the files depend on
layers_0.npz, ...           codes and scales
harms/layers_0.json, ...    of a conversion that chooses the bits of each layer: what it measured
choice_.../                 and its blocks, a folder as this one for each choice
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.conversion.gptq import Rounded
from bitnet_jax.conversion.sensitivity import Harm
from bitnet_jax.data.files import JSON_BYTES, decode, parse_json, read_file

SUBJECT = "conversion.json"


def claim(folder: Path, subject: Mapping[str, Any]) -> None:
    """Makes the folder one of this subject, as JSON values.

    Raises:
      ValueError: it holds blocks of another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SUBJECT
    if not file.exists() or not any(path.suffix in (".npz", ".json") for path in folder.rglob("layers_*")):
        _write(file, json.dumps(subject, indent=1).encode())
        return
    found = parse_json(decode(read_file(file, JSON_BYTES), str(file)), str(file), "a conversion's settings")
    for name, value in subject.items():
        if not isinstance(found, dict) or found.get(name) != value:
            got = found.get(name) if isinstance(found, dict) else None
            raise ValueError(
                f"{folder}: got blocks of an interrupted conversion with {name} {got}, expected {value}; remove it "
                "to start again, or finish that conversion"
            )


class FinishedBlocks:
    """The folder of the blocks that are done.

    Raises:
      ValueError: it holds blocks of another conversion.
    """

    def __init__(self, folder: Path, subject: Mapping[str, Any]):
        """subject: everything that the blocks depend on, as JSON values."""
        self.folder = folder
        claim(folder, subject)

    def read(self, layer: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Rounded] | None:
        """Codes and scales of a block by path; None if it is not done, or its file is damaged."""
        try:
            with (self.folder / _name(layer)).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                read = {path: Rounded(arrays[f"{path}/codes"], arrays[f"{path}/scale"]) for path in shapes}
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError):
            return None
        return read if all(read[path].codes.shape == shape for path, shape in shapes.items()) else None

    def write(self, layer: int, block: Mapping[str, Rounded]) -> None:
        """Keeps a block; its file is complete or absent."""
        file = self.folder / _name(layer)
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as opened:
            np.savez(
                opened,
                **{
                    f"{path}/{name}": array
                    for path, of in block.items()
                    for name, array in of._asdict().items()
                },
            )
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)


class MeasuredBlocks:
    """The harms of the blocks that are measured."""

    def __init__(self, folder: Path):
        self.folder = folder / "harms"
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(
        self, layer: int, paths: Iterable[str], names: Iterable[str]
    ) -> dict[str, dict[str, Harm]] | None:
        """Path -> name -> harm of a block; None if it is not measured, or its file is damaged."""
        file = self.folder / f"layers_{layer}.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return {path: {name: Harm(*map(float, found[path][name])) for name in names} for path in paths}
        except (OSError, KeyError, TypeError, ValueError):
            return None

    def write(self, layer: int, harms: Mapping[str, Mapping[str, Harm]]) -> None:
        _write(self.folder / f"layers_{layer}.json", json.dumps(harms, indent=1).encode())


def _name(layer: int) -> str:
    return f"layers_{layer}.npz"


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(file)
