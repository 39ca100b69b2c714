"""The folder of one run: its files, each written atomically.

config.json      the RunConfig, and the earlier totals of an extended run; see RunFolder.result_under
tokenizer.json   the tokenizer the model was trained with
classes.json     classifiers only: labels and input preprocessing (data/classes.py)
checkpoints/     see checkpoints.py (damaged ones are moved to damaged/)
metrics.jsonl    see metrics.py
samples.jsonl    with evaluation.samples: continuations of held-out text, see samples.py
record.json      where the time goes, see record.py; rewritten while the run proceeds
result.json      status, last measurements and cost; written when the run ends

Without a finished checkpoint or a result the folder counts as empty: starting with other settings replaces its
files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.data import Classes, Tokenizer, from_json
from bitnet_jax.data.classes import CLASSES
from bitnet_jax.training.checkpoints import TEMPORARY, saved_steps
from bitnet_jax.training.config import CHANGEABLE_ON_RESUME, RunConfig, differing_fields
from bitnet_jax.training.metrics import finite_json

MAX_JSON_BYTES = 2**24  # bytes of config.json and result.json; normally a few thousand

# Settings of config.json that may differ from those of a checkpoint: the duration of the run, its measurements and
# the location of the data. Changing any other one would change what the weights mean.
IGNORED_DIFFERENCES = ("training.", "evaluation.", "data.root:")


class RunError(RuntimeError):
    """A run cannot be started, resumed or read. The message is one line that says what to do."""


class RunFolder:
    """The paths of a run, with atomic reads and writes; stateless."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.classes = self.path / CLASSES
        self.checkpoints = self.path / "checkpoints"
        self.damaged = self.path / "damaged"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.record = self.path / "record.json"
        self.tensorboard = self.path / "tensorboard"
        self.result = self.path / "result.json"
        self.lock = self.path / ".lock"

    @property
    def written(self) -> list[Path]:
        """Everything a run may write, in the order in which `overwrite` removes it."""
        files = [
            self.result,
            self.config,
            self.tokenizer,
            self.classes,
            self.metrics,
            self.samples,
            self.record,
        ]
        folders = [self.checkpoints, self.damaged, self.tensorboard]
        return [*files, *(file.with_name(f"{file.name}.tmp") for file in files), *folders]

    def trained(self) -> bool:
        """Whether there is a finished checkpoint, intact or damaged, or a result."""
        return bool(saved_steps(self.checkpoints) or saved_steps(self.damaged)) or self.result.exists()

    def result_under(self, config: RunConfig) -> dict[str, Any] | None:
        """The result if the run is complete under `config`; None if it must be trained or resumed.

        A run resumes only under the settings it began with, except those in `config.CHANGEABLE_ON_RESUME`. With
        training.steps raised, even a finished run resumes from its last checkpoint.

        Raises:
          RunError: the folder holds a run with other settings, one that has done more than training.steps
            updates, or a damaged one; or it is a folder of other runs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"cannot create the run folder {self.path}: Not a directory")
        if not self.trained():
            self._check_no_other_runs()
            return None
        if not self.config.exists():
            raise RunError(
                f"{self.path}: got checkpoints without config.json; restore it, pass --overwrite or use another folder"
            )
        saved, result, steps = self.read_config(), self.read_result(), config.training.steps
        if differing := differing_fields(saved, config, ignored=CHANGEABLE_ON_RESUME):
            raise RunError(
                f"{self.path} holds a run with other settings ({'; '.join(differing)}; saved, then given); use "
                "the same config, pass --overwrite or use another folder"
            )
        if result is not None and result["status"] != "finished":
            if steps != saved.training.steps:
                raise RunError(
                    f"training.steps: got {steps}, but the run in {self.path} {result['status']} at step "
                    f"{result['step']} and cannot be resumed; pass --overwrite or use another folder"
                )
            return result
        done = max(saved_steps(self.checkpoints), default=0)
        if steps < done:
            raise RunError(
                f"training.steps: got {steps}, expected at least the {done} that the run in {self.path} has "
                "completed; pass --overwrite or use another folder"
            )
        if result is not None and result["steps"] == steps:
            return result
        if not done:
            raise RunError(
                f"{self.path}: no checkpoint to resume from (damaged ones are in {self.damaged}); restore an intact "
                "copy, pass --overwrite or use another folder"
            )
        return None

    def _check_no_other_runs(self) -> None:
        """Raises RunError for a folder of runs, such as `runs/` instead of `runs/first`."""
        children = sorted(self.path.iterdir()) if self.path.exists() else []
        others = [child.name for child in children if child.is_dir() and RunFolder(child).trained()]
        if others:
            raise RunError(
                f"{self.path}: got a folder with other runs ({', '.join(others[:5])}), expected the folder of one run; "
                "use another folder, or one inside it"
            )

    def check_overwritable(self) -> None:
        """Raise RunError unless the folder is missing or holds only files of a run."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunError(f"got {self.path}, which is not a folder, expected a run folder to overwrite")
        others = {*self.path.iterdir()} - {*self.written, self.lock}
        if self.checkpoints.is_dir():
            others |= {path for path in self.checkpoints.iterdir() if not path.name.isdigit()}
            others -= {*self.checkpoints.glob(TEMPORARY)}
        if others:
            names = sorted(str(path.relative_to(self.path)) for path in others)
            raise RunError(
                f"got {self.path} with {', '.join(names[:5])}, which no run writes, expected a run folder to "
                "overwrite; use another folder"
            )
        if self.config.exists():
            self.read_config()

    @contextlib.contextmanager
    def training(self, config: RunConfig, *, overwrite: bool = False) -> Iterator[dict[str, Any] | None]:
        """Create the folder and hold an exclusive lock on it; yields `result_under(config)`.

        Args:
          overwrite: first remove the existing run, whatever its settings.

        Raises:
          RunError: see `result_under` (with overwrite: `check_overwritable`), another process holds the lock, or the
            folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self.lock.open("w")
        except OSError as error:
            raise RunError(f"cannot create the run folder {self.path}: {error.strerror or error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"{self.path}: another process is training in it; wait or use another folder"
                ) from error
            if overwrite:
                self.check_overwritable()
                self._clear()
            yield self.result_under(config)

    def _clear(self) -> None:
        try:
            for path in self.written:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot remove {error.filename}: {error.strerror or error}") from error

    def read_config(self) -> RunConfig:
        """Raises: RunError: not a run folder, or its config.json is damaged."""
        if not self.config.exists():
            raise RunError(f"{self.path}: got no config.json, expected the folder of a training run")
        fields = _read_object(self.config)
        fields.pop(EXTENDED_FROM, None)
        try:
            return RunConfig.from_dict(fields)
        except ValueError as error:
            raise RunError(f"{self.config} cannot be read: {error}") from error

    def write_config(self, config: RunConfig, extended_from: Sequence[int] = ()) -> None:
        """Write the settings, and for an extended run its earlier values of training.steps."""
        fields = config.to_dict() | ({EXTENDED_FROM: list(extended_from)} if extended_from else {})
        write_atomic(self.config, json.dumps(fields, indent=2, sort_keys=True) + "\n")

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Write the tokenizer unless something was already trained with an existing one."""
        if not (self.tokenizer.exists() and self.trained()):
            write_atomic(self.tokenizer, tokenizer.to_json())

    def read_tokenizer(self) -> Tokenizer:
        """Raises: RunError: tokenizer.json is missing or damaged."""
        try:
            _check_regular(self.tokenizer)
            return from_json(self.tokenizer.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise RunError(f"{self.tokenizer} cannot be read: {error}") from error

    def write_classes(self, classes: Classes) -> None:
        """Write the classes unless something was already trained with existing ones."""
        if not (self.classes.exists() and self.trained()):
            write_atomic(self.classes, classes.to_json())

    def read_classes(self) -> Classes | None:
        """None: not a classifier, or trained by a version without this file. Raises: RunError: it is damaged."""
        if not self.classes.exists():
            return None
        try:
            _check_regular(self.classes)
            return Classes.from_json(self.classes.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise RunError(f"{self.classes} cannot be read: {error}") from error

    def files_crc32(self) -> dict[str, int]:
        """CRC-32 of the files that define the model's inputs and outputs, for the `meta` of a checkpoint."""
        try:
            return {
                path.name: zlib.crc32(path.read_bytes())
                for path in (self.tokenizer, self.classes)
                if path.exists()
            }
        except OSError as error:
            raise RunError(f"{self.path}: cannot read its files: {error.strerror or error}") from error

    def check_meta(self, config: RunConfig, meta: Mapping[str, Any]) -> None:
        """Check that config.json and the other files match those a checkpoint was written with.

        Raises:
          RunError: a setting not in IGNORED_DIFFERENCES, or a file, was changed since; the message names it.
        """
        try:
            trained = RunConfig.from_dict(meta["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.path}: the checkpoint's settings cannot be read: {error}") from error
        differing = [
            entry for entry in differing_fields(trained, config) if not entry.startswith(IGNORED_DIFFERENCES)
        ]
        if differing:
            raise RunError(
                f"{self.config} was changed after training ({'; '.join(differing)}; trained with, now in the file); "
                "restore the trained values"
            )
        now, then = self.files_crc32(), meta.get("files_crc32", {})  # missing in older checkpoints
        changed = [name for name in then if now.get(name) != then[name]]
        if changed:
            raise RunError(
                f"{self.path / changed[0]} was changed or removed after training: got the checksum "
                f"{now.get(changed[0])}, expected {then[changed[0]]}; restore it"
            )

    def read_result(self) -> dict[str, Any] | None:
        """None while the run is incomplete. Raises: RunError: result.json is damaged."""
        if not self.result.exists():
            return None
        result = _read_object(self.result, "; remove it to finish the run again")
        if missing := {"status", "step", "steps"} - result.keys():
            raise RunError(
                f"{self.result} cannot be read: it lacks {', '.join(sorted(missing))}; remove it to finish the "
                "run again"
            )
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomic(self.result, json.dumps(finite_json(result), indent=2, allow_nan=False) + "\n")


EXTENDED_FROM = "extended_from"  # in config.json, in result.json and in the meta of checkpoints


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():  # opening a pipe could block forever
        raise ValueError("got a folder, pipe or device, expected a file")


def _read_object(path: Path, advice: str = "") -> dict[str, Any]:
    try:
        _check_regular(path)
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"got {size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"got JSON {type(value).__name__}, expected an object")
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}{advice}") from error
    return value


def write_atomic(path: Path, text: str) -> None:
    """Write a file atomically: it is complete on disk or absent, also after a failure."""
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
            f"cannot write {path}: {error.strerror or error}; free disk space or fix permissions"
        ) from error
