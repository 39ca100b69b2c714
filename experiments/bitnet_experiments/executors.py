"""How the runs of a sweep are executed: one after another, in parallel processes, or as jobs of a cluster."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bitnet_experiments.plan import Job, Plan
from bitnet_experiments.study import Row, read_results
from bitnet_jax.optional_packages import missing_package

Claim = Callable[[Plan, Job], Row | None]
REFUSED = 2  # exit code of a process whose run must not be added to the rows there are


def executed(
    claim: Claim, plan: Plan, todo: Sequence[Job], jobs: int, executor: str, cluster: dict[str, Any]
) -> Iterator[Row | None]:
    """The result of `claim` for every run, as they end; runs that are under way stop with the iterator.

    Args:
      jobs: how many at a time.
      executor: process: on this machine; slurm, local: through submitit.
      cluster: parameters of submitit's executor.

    Raises:
      ValueError: submitit is not installed, or a run would stand beside rows of another origin.
    """
    if executor != "process":
        return _submitted(claim, plan, todo, jobs, executor, cluster)
    if jobs > 1:
        return _in_parallel(claim, plan, todo, jobs)
    return (claim(plan, job) for job in todo)


def _in_parallel(claim: Claim, plan: Plan, todo: Sequence[Job], jobs: int) -> Iterator[Row | None]:
    """In separate processes. When stopped, it first stops them cleanly."""
    context = multiprocessing.get_context("spawn")
    waiting = list(todo)
    running: dict[Any, tuple[Any, Job]] = {}  # by the sentinel of the process
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                one = waiting.pop(0)
                process = context.Process(target=_in_process, args=(claim, plan, one))
                process.start()
                running[process.sentinel] = (process, one)
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, one = running.pop(sentinel)
                process.join()
                if process.exitcode == REFUSED:
                    raise ValueError(f"{one.name} was not started; see the message above")
                if process.exitcode != 0:
                    print(
                        f"{one.name} exited with code {process.exitcode}; start the sweep again",
                        file=sys.stderr,
                    )
                yield next((row for row in read_results(plan.file(one)) if row["run"] == one.name), None)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, _ in running.values():
            process.terminate()  # on SIGTERM a training run saves a checkpoint
        for process, _ in running.values():
            process.join()


def _in_process(claim: Claim, plan: Plan, job: Job) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches only the parent, which then stops each child once
    try:
        claim(plan, job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def _submitted(
    claim: Claim, plan: Plan, todo: Sequence[Job], jobs: int, executor: str, cluster: dict[str, Any]
) -> Iterator[Row | None]:
    """As submitit jobs: on Slurm, or in processes on this machine."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError(f"executor {executor!r}: {missing_package('submitit')}") from error
    submitter = submitit.AutoExecutor(folder=plan.workdir / "submitit", cluster=executor)
    limits = {"slurm_array_parallelism": jobs} if executor == "slurm" else {}
    submitter.update_parameters(**{"name": "sweep", "timeout_min": 24 * 60, **limits, **cluster})
    # The local executor starts all its jobs at once.
    size = jobs if executor == "local" else max(len(todo), 1)
    for start in range(0, len(todo), size):
        part = todo[start : start + size]
        for job in submitter.map_array(claim, [plan] * len(part), part):
            try:
                yield job.result()
            except Exception as error:  # killed or timed out: it has no row
                print(f"job {job.job_id}: {error}; start the sweep again", file=sys.stderr)
                yield None
