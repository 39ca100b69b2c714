"""Every run below a folder, finished or not, read without changing anything; and how their settings differ."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitnet_jax.models import ModelConfig
from bitnet_jax.training.checkpoints import saved_steps
from bitnet_jax.training.config import RunConfig, flat_fields
from bitnet_jax.training.run_folder import RunError, RunFolder

LOCKS = Path("/proc/locks")
TAIL_BYTES = 1 << 18  # of metrics.jsonl, for the newest rows of a run that has not ended
COLUMNS = (
    "run",
    "status",
    "step",
    "steps",
    "loss",
    "bits_per_byte",
    "tokens_per_second",
    "mfu",
    "goodput",
    "parameters",
    "precision",
    "updated",
    "problem",
)


def find_runs(folder: str | Path) -> list[Path]:
    """The run folders in `folder`, itself included, sorted by path; symbolic links are not followed.

    Raises:
      RunError: no such folder.
    """
    if not Path(folder).is_dir():
        raise RunError(f"got {folder}, expected a folder that contains runs")
    found = []
    for place, folders, files in os.walk(folder):
        if {".lock", "metrics.jsonl"} & {*files} or {"config.json", "result.json"} <= {*files}:
            found.append(Path(place))
            folders.clear()
        folders.sort()
    return found


def list_runs(folder: str | Path, sort: str | None = None) -> list[dict[str, Any]]:
    """A row with COLUMNS for each run below `folder`; what is unknown is None.

    The status is that of the result (finished, diverged), `running` if a process of this machine trains in the folder,
    `unfinished`, or `damaged`, in which case `problem` says why. The loss is the newest one on held-out data.

    Args:
      sort: column to sort by, runs without a value last; None: by path.
    """
    rows = [describe_run(path, str(path.relative_to(folder))) for path in find_runs(folder)]
    if sort is not None:
        rows.sort(key=lambda row: (row[sort] is None, row[sort] if row[sort] is not None else 0))
    return rows


def describe_run(path: Path, name: str) -> dict[str, Any]:
    folder, row = RunFolder(path), dict.fromkeys(COLUMNS) | {"run": name}
    row["updated"] = _updated(folder)
    try:
        result, config = folder.read_result(), folder.read_config()
        row["precision"] = _precision(config)
        row["status"] = "running" if is_locked(folder.lock) else "unfinished"
        row["steps"] = config.training.steps
        newest = _newest_rows(folder.metrics) if result is None else result
        valid = newest.get("valid", {})
        row["loss"], row["bits_per_byte"] = _number(valid.get("loss")), _number(valid.get("bits_per_byte"))
        if result is None:
            row["step"] = max([*saved_steps(folder.checkpoints), newest["step"]])
        else:
            row |= {name: result.get(name) for name in ("status", "step", "steps", "parameters")}
            row["problem"] = result.get("message")
        record = _record(folder) if result is None else result.get("record") or {}
        row |= {name: record.get(name) for name in ("tokens_per_second", "mfu", "goodput")}
    except (
        RunError,
        OSError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:  # files of others may hold anything
        row |= {"status": "damaged", "problem": " ".join(str(error).split())}
    return row


def differing_settings(runs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Setting -> its value in every run, for those that are not the same in all, `not set` where a model has none.

    Raises:
      RunError: not a run folder, or its config.json is damaged.
    """
    settings = {name: flat_fields(RunFolder(path).read_config()) for name, path in runs.items()}
    names = sorted({field for fields in settings.values() for field in fields})
    table = {field: {run: settings[run].get(field, "not set") for run in runs} for field in names}
    return {field: values for field, values in table.items() if len({*map(repr, values.values())}) > 1}


def is_locked(file: Path, locks: Path = LOCKS) -> bool:
    """Whether a process of this machine holds the lock of a run, without trying to take it. False where unknown."""
    try:
        status = file.stat()
        held = locks.read_text(encoding="utf-8")
    except OSError:
        return False
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    return any("FLOCK" in line and f"{device}:{status.st_ino}" in line.split() for line in held.splitlines())


def _newest_rows(metrics: Path) -> dict[str, Any]:
    """The newest row of each kind near the end of the file, and the highest step."""
    newest: dict[str, Any] = {"step": 0}
    for row in _tail(metrics):
        newest[str(row.get("kind"))] = row
        newest["step"] = max(newest["step"], row["step"])
    return newest


def _tail(metrics: Path) -> Iterator[dict[str, Any]]:
    if not metrics.exists():
        return
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines: Iterable[bytes] = file.read().splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut off by our seek, or by the end of the process
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _record(folder: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(folder.record.read_text(encoding="utf-8"))["summary"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _precision(config: RunConfig) -> str:
    default = "" if config.task == "images" else ModelConfig.precision
    precision = config.model.get("precision", default)
    return precision if isinstance(precision, str) else json.dumps(precision)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)  # JSON holds NaN and infinities as strings


def _updated(folder: RunFolder) -> str | None:
    """When one of its files was last written, as local time."""
    times = []
    for file in (folder.result, folder.record, folder.metrics, folder.config, folder.lock):
        if file.exists():
            times.append(file.stat().st_mtime)
    return datetime.datetime.fromtimestamp(max(times)).isoformat(" ", "seconds") if times else None
