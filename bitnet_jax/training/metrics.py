"""The metrics of a run: one JSON object per line, each with the number of updates at which it was measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bitnet_jax.optional_packages import missing_package


def finite_json(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by the strings "nan", "inf", "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(inner) for inner in value]
    return value


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file, skipping lines left incomplete by a killed process."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


class MetricsLog:
    """Appends rows to `path`. Use as a context manager, or call `close`.

    Rows after `resume_step` are dropped first, since the run measures them again. Rows are on disk after `flush`.

    Args:
      path: None drops the rows: in all processes of a run but the first.
      tensorboard: folder in which scalars and texts are also written for TensorBoard (optional package tensorboardX).

    Raises:
      OSError: the file cannot be written.
      ValueError: tensorboard is given but tensorboardX is not installed.
    """

    def __init__(self, path: Path | None, *, resume_step: int = 0, tensorboard: Path | None = None):
        self._path, self._tensorboard = path, tensorboard
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        if self._path is not None and self._path.exists():
            _rewrite(self._path, [row for row in read_metrics(self._path) if row["step"] <= resume_step])
        self._board = None if self._tensorboard is None else _tensorboard(self._tensorboard, resume_step)
        path = Path(os.devnull) if self._path is None else self._path
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append `values` measured after `step` updates; `kind` is "train", "valid" or the name of a sample."""
        self._file.write(_line({"step": step, "kind": kind, **values}))
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, float) and math.isfinite(value):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
                elif isinstance(value, str):
                    self._board.add_text(f"{kind}/{name}", value, step)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, to which the run has returned."""
        self.close()
        self._open(step)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite_json(row), allow_nan=False) + "\n"


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(map(_line, rows)), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(folder: Path, resume_step: int) -> Any:
    try:
        import tensorboardX
    except ModuleNotFoundError as error:
        raise ValueError(f"training.tensorboard is on: {missing_package('tensorboardX')}") from error
    return tensorboardX.SummaryWriter(str(folder), purge_step=resume_step + 1)
