"""The folder of one run: what is in it, written so that a reader never sees half a file.

config.json      the RunConfig; a run goes on only under the same one
tokenizer.json   the tokenizer that its tokens mean
classes.json     of a classifier: labels, and how its inputs are made (data/classes.py)
checkpoints/     see checkpoints.py (and damaged/, where bad ones were set aside)
metrics.jsonl    see metrics.py
result.json      status, last measurements and cost; there once the run is over
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitnet_jax.data import Classes, Tokenizer, from_json
from bitnet_jax.data.classes import CLASSES
from bitnet_jax.training.config import RunConfig, differing_fields
from bitnet_jax.training.metrics import finite_json

# Settings of config.json that may differ from those a checkpoint was written under: how long a run goes on, what
# is measured on the way, and where the data lie. No other one leaves the meaning of its weights alone.
MAY_DIFFER = ("training.", "evaluation.", "data.root:")


class RunError(RuntimeError):
    """A run cannot start, go on or be read; the message is one line that says what to do."""


class RunFolder:
    """Paths and whole-file reads and writes; holds no state."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.classes = self.path / CLASSES
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"

    @contextlib.contextmanager
    def training(self, config: RunConfig) -> Iterator[None]:
        """Makes the folder or checks that its run has `config`; keeps other processes out while training.

        Raises:
          RunError: another config, another process at work, or a folder that cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"cannot make the run folder {self.path}: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"{self.path}: another process is training in it; wait or use another"
                ) from error
            if self.config.exists():
                if differing := differing_fields(self.read_config(), config):
                    raise RunError(
                        f"{self.path} holds a run with other settings ({'; '.join(differing)}; saved, then "
                        "given); give it the same config or another folder"
                    )
            elif self.checkpoints.exists():
                raise RunError(
                    f"{self.path}: checkpoints without config.json; put it back or use another folder"
                )
            else:
                write_whole(self.config, config.to_json())
            yield

    def read_config(self) -> RunConfig:
        """Raises: RunError: not the folder of a run, or its config.json is damaged."""
        try:
            return RunConfig.from_json(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{self.path}: no config.json; expected the folder of a training run") from error
        except (ValueError, OSError) as error:
            raise RunError(f"{self.config} cannot be read: {error}") from error

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        if not self.tokenizer.exists():
            write_whole(self.tokenizer, tokenizer.to_json())

    def read_tokenizer(self) -> Tokenizer:
        """Raises: RunError: there is no tokenizer.json, or it is damaged."""
        try:
            return from_json(self.tokenizer.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise RunError(f"{self.tokenizer} cannot be read: {error}") from error

    def write_classes(self, classes: Classes) -> None:
        if not self.classes.exists():
            write_whole(self.classes, classes.to_json())

    def read_classes(self) -> Classes | None:
        """None: no classifier, or trained before such a file was written. Raises: RunError: it is damaged."""
        if not self.classes.exists():
            return None
        try:
            return Classes.from_json(self.classes.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise RunError(f"{self.classes} cannot be read: {error}") from error

    def files_crc32(self) -> dict[str, int]:
        """CRC-32 of the files that say what the weights mean, for the `meta` of a checkpoint."""
        try:
            return {
                path.name: zlib.crc32(path.read_bytes())
                for path in (self.tokenizer, self.classes)
                if path.exists()
            }
        except OSError as error:
            raise RunError(f"{self.path}: cannot read its files: {error.strerror or error}") from error

    def check_meta(self, config: RunConfig, meta: Mapping[str, Any]) -> None:
        """Compares config.json and the other files of the folder with what a checkpoint was written under.

        Raises:
          RunError: a setting but those in MAY_DIFFER, or a file, was changed since; the message names it.
        """
        try:
            trained = RunConfig.from_dict(meta["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.path}: its checkpoint holds settings that cannot be read: {error}"
            ) from error
        differing = [entry for entry in differing_fields(trained, config) if not entry.startswith(MAY_DIFFER)]
        if differing:
            raise RunError(
                f"{self.config} was changed after training ({'; '.join(differing)}; trained with, now in the file); "
                "put the trained values back"
            )
        now, then = self.files_crc32(), meta.get("files_crc32", {})  # older checkpoints hold none
        changed = [name for name in then if now.get(name) != then[name]]
        if changed:
            raise RunError(
                f"{self.path / changed[0]} was changed or removed after training: it has the checksum "
                f"{now.get(changed[0])}, expected {then[changed[0]]}; restore it"
            )

    def read_result(self) -> dict[str, Any] | None:
        """None while the run is not over. Raises: RunError: result.json is damaged."""
        if not self.result.exists():
            return None
        try:
            return json.loads(self.result.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(
                f"{self.result} cannot be read: {error}; remove it to finish the run anew"
            ) from error

    def write_result(self, result: dict[str, Any]) -> None:
        write_whole(self.result, json.dumps(finite_json(result), indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file appears under its name only once it is complete on disk; on failure nothing is left behind."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; make room or fix permissions"
        ) from error
