"""Executes every run of a study; a second start resumes where the first stopped.

The full setting adds rows to `studies/<study>/results.jsonl`; the small one (same question, two cores, minutes)
to `<workdir>/results.jsonl`. A run that fails or diverges is recorded as a row and does not stop the others, unless
every arm fails alike. Which runs need to be executed is decided by `Plan.needed`: those without a row, with a stale
one (freshness.py), and failed ones whose code or settings have changed.

On Ctrl-C and SIGTERM every training run saves a checkpoint and loses at most one update. On SIGKILL or a machine
failure it loses the updates since its last checkpoint. The next start resumes from there. Two sweeps of one study
share the remaining runs: a run belongs to the process that holds its lock, which is released with the process.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_experiments.executors import executed
from bitnet_experiments.freshness import plain
from bitnet_experiments.origin import DIRTY, check_one_origin, origin, origin_here
from bitnet_experiments.plan import Job, Plan, job_of, make_plan
from bitnet_experiments.runs import locked, train
from bitnet_experiments.study import Row, Study, read_results, row_of
from bitnet_experiments.tuning import search
from bitnet_jax.training.run_folder import write_atomic

LOST = 3  # attempts at a trial that ends without a row


def run_one(plan: Plan, job: Job, here: dict[str, str]) -> dict[str, Any]:
    """The row of one run; a failure is recorded in it, not raised."""
    study, (arm, seed), small, more = plan.study, (job.arm, job.seed), plan.small, plan.more(job)
    row: dict[str, Any] = {"run": job.name, "arm": arm, "seed": seed}
    row |= {"overrides": plain(study.overrides(arm, seed, small, more))}
    row |= {"settings_hash": study.settings_hash(arm, seed, small, more)} | here
    marks = {"small": small, "tuned": plain(job.values), "sets": plain(plan.sets)}
    row |= {name: value for name, value in marks.items() if value}
    start = time.monotonic()
    try:
        if study.run is not None:
            own = {"overrides": more} if study.takes_overrides else {}
            row |= {"status": "finished"} | study.run(arm, seed, plan.workdir, small, **own)
        else:
            row |= train(study.settings(arm, seed, small, more), plan.workdir / job.name)
    except Exception as error:  # recorded in the row; the sweep continues
        traceback.print_exc()
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        row |= {"traceback": traceback.format_exc()}
    seconds = max(
        time.monotonic() - start, row.get("training_seconds", 0.0)
    )  # a resumed run took longer in total
    return row | {"wall_seconds": round(seconds, 1)}


def claim(plan: Plan, job: Job) -> Row | None:
    """Executes a run and records its row; None if it is done already or another process is working on it.

    Raises:
      ValueError: its row would stand beside rows of another origin.
    """
    file, here = plan.file(job), origin(plan.study)
    locks = file.parent / ".locks"
    with locked(locks / job.name, wait=False) as mine:
        rows = read_results(file)
        if not mine or not plan.needed(job, row_of(rows, job.name), here):
            return None
        if not plan.mix:
            check_one_origin(plan.apart(rows, here, [job.arm]), here, file)
        row = run_one(plan, job, here)
        with locked(locks / "results"):
            others = [other for other in read_results(file) if other["run"] != job.name]
            if plan.apart(others, here, [job.arm]):
                row |= {"mixed": True}
            write_atomic(file, "".join(json.dumps(plain(r)) + "\n" for r in (*others, row)))
    return row


def sweep(
    study: Study,
    workdir: Path,
    small: bool,
    *,
    jobs: int = 1,
    executor: str = "process",
    cluster: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Adds a row for every run that needs one; returns the path of the results.

    Args:
      options: of `make_plan`.

    Raises:
      ValueError: invalid options, every arm failed alike, rows of another origin, or an arm that cannot be tuned.
    """
    return execute(make_plan(study, workdir, small=small, **options), jobs, executor, cluster or {})


def execute(plan: Plan, jobs: int, executor: str, cluster: dict[str, Any]) -> Path:
    """`sweep` of a plan."""
    how = (jobs, executor, cluster)
    alone = executor == "process" and jobs == 1
    here = origin(plan.study) if alone else origin_here(plan.study)
    if here["code"].endswith(DIRTY) and plan.folder == plan.study.folder:
        print("the code has uncommitted changes, and the rows will say so; commit before", file=sys.stderr)
    tuned = _tune(plan, here, how) if plan.study.tune else {}
    every = plan.jobs(tuned)
    todo = _needed(plan, every, here)
    print(f"{plan.study.name}: {len(every) - len(todo)} runs done, {len(todo)} to go", file=sys.stderr)
    _run_all(plan, todo, how)
    if without := [arm for arm in plan.tuned_arms if arm not in tuned]:
        raise ValueError(
            f"{plan.study.name}: got no finished trials of {', '.join(without)} with any values, expected some to "
            "choose from; see tuning.jsonl and change TUNE"
        )
    return plan.results


def _needed(plan: Plan, jobs: Sequence[Job], here: dict[str, str]) -> list[Job]:
    """Those of the jobs, all of one file, that need to be executed. Raises ValueError: of another origin."""
    if not jobs:
        return []
    file = plan.file(jobs[0])
    rows = read_results(file)
    by_name = {row["run"]: row for row in rows}
    todo = [job for job in jobs if plan.needed(job, by_name.get(job.name), here)]
    if todo and not plan.mix:
        check_one_origin(plan.apart(rows, here, [job.arm for job in todo]), here, file)
    failed = sum(by_name.get(job.name, {}).get("status") == "failed" for job in jobs if job not in todo)
    if failed:
        print(
            f"{plan.study.name}: {failed} runs failed and would again; --retry-failed repeats them",
            file=sys.stderr,
        )
    return todo


def _tune(
    plan: Plan, here: dict[str, str], how: tuple[int, str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Executes the searches of this part's arms; arm -> chosen values."""
    tried: set[str] = set()
    lost: dict[str, int] = {}
    while True:
        rows = read_results(plan.tuning)
        states = {arm: search(plan.study, arm, rows, plan.small, plan.sets) for arm in plan.tuned_arms}
        trials = {
            trial.name: trial for one in states.values() for trial in one.trials
        }  # arms may share a search
        jobs = [job_of(trial) for name, trial in trials.items() if name not in tried]
        todo = _needed(plan, jobs, here)
        if not todo:
            return {arm: one.values for arm, one in states.items() if one.values is not None}
        print(f"{plan.study.name}: {len(todo)} runs of the search to go", file=sys.stderr)
        tried |= {row["run"] for row in _run_all(plan, todo, how)}
        for job in todo:
            if job.name in tried:
                continue
            with locked(plan.tuning.parent / ".locks" / job.name):  # another process's: wait for it
                found = row_of(read_results(plan.tuning), job.name)
            if found is not None:
                tried.add(job.name)
                continue
            lost[job.name] = lost.get(job.name, 0) + 1
            if lost[job.name] == LOST:
                raise ValueError(f"{job.name} ended {LOST} times without a row; see its messages above")


def _run_all(plan: Plan, todo: Sequence[Job], how: tuple[int, str, dict[str, Any]]) -> list[Row]:
    """Executes the jobs; the rows added. Raises ValueError: every arm failed alike, and more would."""
    rows: list[Row] = []
    began = time.monotonic()
    with contextlib.closing(executed(claim, plan, todo, *how)) as found:
        for row in found:
            if row is None:
                continue
            rows.append(row)
            metric = plan.study.tuned_by if todo[0].trial else plan.study.metric
            left = (time.monotonic() - began) / len(rows) * (len(todo) - len(rows)) / 60
            print(
                f"[{len(rows)}/{len(todo)}] {row['run']}: {row['status']}, {metric} {row.get(metric)}, "
                f"{row['wall_seconds']:.0f} s; about {left:.0f} minutes left",
                file=sys.stderr,
            )
            error = failed_alike(rows, {job.arm for job in todo})
            if error is not None and len(rows) < len(todo):
                raise ValueError(
                    f"{plan.study.name}: every arm failed alike ({error}), so {len(todo) - len(rows)} more runs were "
                    "not started; correct it and start the sweep again"
                )
    return rows


def failed_alike(rows: Sequence[Row], arms: set[str]) -> str | None:
    """The error that every run so far failed with, if each of the arms has."""
    if {row["arm"] for row in rows} != arms or any(row["status"] != "failed" for row in rows):
        return None
    errors = {row["error"].replace(row["run"], "RUN") for row in rows}
    return rows[0]["error"] if len(errors) == 1 else None
