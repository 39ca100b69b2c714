"""Executes every run of a study; a second start resumes where the first stopped.

The full setting adds rows to `studies/<study>/results.jsonl`; the small one (same question, two cores, minutes)
to `<workdir>/results.jsonl`. A run that fails or diverges is recorded as a row and does not stop the others.

On Ctrl-C and SIGTERM every training run saves a checkpoint and loses at most one update. On SIGKILL or a machine
failure it loses the updates since its last checkpoint. The next start resumes from there. Two sweeps of one study
share the remaining runs: a run belongs to the process that holds its lock, which is released with the process.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitnet_experiments.provenance import provenance
from bitnet_experiments.runs import locked, train
from bitnet_experiments.study import Study, read_results
from bitnet_jax.optional_packages import missing_package
from bitnet_jax.training.run_folder import write_atomic

Row = dict[str, Any]


def run_one(study: Study, name: str, workdir: Path, small: bool) -> Row:
    """The row of one run; a failure is recorded in it, not raised."""
    arm, seed = study.runs(small)[name]
    row: Row = {"run": name, "arm": arm, "seed": seed, "overrides": _json(study.overrides(arm, seed, small))}
    row |= {"config_hash": _settings_hash(study, arm, seed, small)} | provenance()
    start = time.monotonic()
    try:
        if study.run is not None:
            row |= {"status": "finished"} | study.run(arm, seed, workdir, small)
        else:
            row |= train(study.settings(arm, seed, small), workdir / name)
    except Exception as error:  # recorded in the row; the sweep continues
        traceback.print_exc()
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        row |= {"traceback": traceback.format_exc()}
    seconds = max(
        time.monotonic() - start, row.get("training_seconds", 0.0)
    )  # a resumed run took longer in total
    return row | {"wall_seconds": round(seconds, 1)}


class Assignment(NamedTuple):
    """One run of a sweep, as passed to another process."""

    study: Study
    name: str
    workdir: Path
    results: Path
    small: bool
    retry_failed: bool


def claim(one: Assignment) -> Row | None:
    """Executes a run and records its row; None if it is done already or another process is working on it."""
    study, name, workdir, results, small, retry_failed = one
    locks = results.parent / ".locks"
    with locked(locks / name, wait=False) as mine:
        if not mine or name not in pending(study, results, small, retry_failed):
            return None
        row = run_one(study, name, workdir, small)
        with locked(locks / "results"):
            others = [other for other in read_results(results) if other["run"] != name]
            write_atomic(results, "".join(json.dumps(_json(r)) + "\n" for r in (*others, row)))
    return row


def pending(study: Study, results: Path, small: bool, retry_failed: bool) -> list[str]:
    """The runs to execute: those without a row, and failed ones to be retried.

    A failed run is retried if its settings have changed; with unchanged settings (the machine was full, the code was
    fixed) only with `retry_failed`. Any other row is final.

    Raises:
      ValueError: results contain rows made with other overrides than the study has now.
    """
    rows = {row["run"]: row for row in read_results(results)}
    names, stale = [], []
    for name, (arm, seed) in study.runs(small).items():
        row = rows.get(name)
        same = row is not None and row.get("overrides") == _json(study.overrides(arm, seed, small))
        if row is None:
            names.append(name)
        elif row["status"] == "failed":
            if retry_failed or not same or row.get("config_hash") != _settings_hash(study, arm, seed, small):
                names.append(name)
        elif not same:
            stale.append(name)
    if stale:
        raise ValueError(
            f"{results}: got rows of {', '.join(stale)} made with other settings than the study has now; "
            "remove these lines (and their folders in the workdir) to measure them again"
        )
    return names


def _settings_hash(study: Study, arm: str, seed: int, small: bool) -> str | None:
    """Hash of a run's complete config, including base settings; None if there is none or it is invalid."""
    try:
        return study.settings(arm, seed, small).hash()
    except (ValueError, OSError):
        return None


def sweep(
    study: Study,
    workdir: Path,
    small: bool,
    *,
    jobs: int = 1,
    executor: str = "process",
    retry_failed: bool = False,
    cluster: dict[str, Any] | None = None,
) -> Path:
    """Adds a row for every run that has none yet; returns the path of the results."""
    results = workdir / "results.jsonl" if small else study.results
    names = pending(study, results, small, retry_failed)
    print(
        f"{study.name}: {len(study.runs(small)) - len(names)} runs done, {len(names)} to go", file=sys.stderr
    )
    todo = [Assignment(study, name, workdir, results, small, retry_failed) for name in names]
    if executor != "process":
        rows = _submitted(todo, executor, workdir, jobs, cluster or {})
    elif jobs > 1:
        rows = _in_parallel(todo, jobs)
    else:
        rows = map(claim, todo)
    began = time.monotonic()
    for number, row in enumerate(rows, 1):
        if row is not None:
            left = (time.monotonic() - began) / number * (len(names) - number) / 60
            print(
                f"[{number}/{len(names)}] {row['run']}: {row['status']}, {study.metric} {row.get(study.metric)}, "
                f"{row['wall_seconds']:.0f} s; about {left:.0f} minutes left",
                file=sys.stderr,
            )
    return results


def _in_parallel(todo: Sequence[Assignment], jobs: int) -> Iterator[Row | None]:
    """`claim` in separate processes, `jobs` at a time. When stopped, it first stops them cleanly."""
    context = multiprocessing.get_context("spawn")
    waiting = list(todo)
    running: dict[Any, tuple[Any, Assignment]] = {}  # by the sentinel of the process
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                one = waiting.pop(0)
                process = context.Process(target=_in_process, args=(one,))
                process.start()
                running[process.sentinel] = (process, one)
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, one = running.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    print(
                        f"{one.name} exited with code {process.exitcode}; start the sweep again",
                        file=sys.stderr,
                    )
                yield next((row for row in read_results(one.results) if row["run"] == one.name), None)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, _ in running.values():
            process.terminate()  # on SIGTERM a training run saves a checkpoint
        for process, _ in running.values():
            process.join()


def _in_process(one: Assignment) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches only the parent, which then stops each child once
    claim(one)


def _submitted(
    todo: Sequence[Assignment], executor: str, workdir: Path, jobs: int, cluster: dict[str, Any]
) -> Iterator[Row | None]:
    """`claim` as submitit jobs: on Slurm, or in processes on this machine."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError(f"executor {executor!r}: {missing_package('submitit')}") from error
    submitter = submitit.AutoExecutor(folder=workdir / "submitit", cluster=executor)
    limits = {"slurm_array_parallelism": jobs} if executor == "slurm" else {}
    submitter.update_parameters(**{"name": "sweep", "timeout_min": 24 * 60, **limits, **cluster})
    # The local executor starts all its jobs at once.
    size = jobs if executor == "local" else max(len(todo), 1)
    for start in range(0, len(todo), size):
        for job in submitter.map_array(claim, todo[start : start + size]):
            try:
                yield job.result()
            except Exception as error:  # killed or timed out: it has no row
                print(f"job {job.job_id}: {error}; start the sweep again", file=sys.stderr)
                yield None


def _json(value: Any) -> Any:
    """The value after a JSON round trip: tuples become lists."""
    return json.loads(json.dumps(value))
