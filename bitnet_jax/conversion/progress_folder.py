"""What an interrupted conversion has finished: one file of codes and scales per block, and what they belong to."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.conversion.gptq import Rounded
from bitnet_jax.data.files import JSON_BYTES, decode, parse_json, read_file

SUBJECT = "conversion.json"


class FinishedBlocks:
    """The folder of the blocks that are done.

    Raises:
      ValueError: it holds blocks of another conversion.
    """

    def __init__(self, folder: Path, subject: Mapping[str, Any]):
        """subject: everything that the blocks depend on, as JSON values."""
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        file = folder / SUBJECT
        if not file.exists() or not any(folder.glob("layers_*.npz")):
            _write(file, json.dumps(subject, indent=1).encode())
            return
        found = parse_json(
            decode(read_file(file, JSON_BYTES), str(file)), str(file), "a conversion's settings"
        )
        for name, value in subject.items():
            if not isinstance(found, dict) or found.get(name) != value:
                got = found.get(name) if isinstance(found, dict) else None
                raise ValueError(
                    f"{folder}: got blocks of an interrupted conversion with {name} {got}, expected {value}; remove it "
                    "to start again, or finish that conversion"
                )

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

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def _name(layer: int) -> str:
    return f"layers_{layer}.npz"


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(file)
