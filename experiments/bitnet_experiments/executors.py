"""How the runs of a sweep are executed: one after another, in parallel processes, or as jobs of a cluster."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from types import FrameType
from typing import Any

from bitnet_experiments.plan import Job, Plan
from bitnet_experiments.study import Row, read_results, row_of
from bitnet_jax.optional_packages import missing_package
from bitnet_jax.training.interrupt import Interrupted

Claim = Callable[[Plan, Job], Row | None]
REFUSED = 2  # exit code of a process whose run must not be added to the rows there are
# How often a job is submitted again, by cause; and the states of Slurm in which the cluster took it away.
RETRIES = {"lost": 20, "error": 1}
LOST_STATES = ("NODE_FAIL", "PREEMPTED", "TIMEOUT", "BOOT_FAIL", "REVOKED")


def executed(
    claim: Claim, plan: Plan, todo: Sequence[Job], jobs: int, executor: str, cluster: dict[str, Any]
) -> Generator[Row | None, None, None]:
    """The result of `claim` for every run, as they end; runs that are under way stop with the iterator.

    Args:
      jobs: how many at a time.
      executor: process: on this machine; slurm, local: through submitit.
      cluster: parameters of submitit's executor.

    Raises:
      ValueError: submitit is not installed, or a run would stand beside rows of another origin.
    """
    if executor != "process":
        yield from _submitted(claim, plan, todo, jobs, executor, cluster)
    elif jobs > 1:
        yield from _in_parallel(claim, plan, todo, jobs)
    else:
        yield from (claim(plan, job) for job in todo)


def _in_parallel(claim: Claim, plan: Plan, todo: Sequence[Job], jobs: int) -> Iterator[Row | None]:
    """In separate processes, each with its own share of the processors. When stopped, it first stops them cleanly."""
    context = multiprocessing.get_context("spawn")
    waiting, free = list(todo), list(range(jobs))
    running: dict[Any, tuple[Any, Job, int]] = {}  # by the sentinel of the process; the last is its share
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                one, share = waiting.pop(0), free.pop(0)
                process = context.Process(target=_in_process, args=(claim, plan, one, (share, jobs)))
                process.start()
                running[process.sentinel] = (process, one, share)
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, one, share = running.pop(sentinel)
                process.join()
                free.append(share)
                if process.exitcode == REFUSED:
                    raise ValueError(f"{one.name} was not started; see the message above")
                if process.exitcode != 0:
                    print(
                        f"{one.name} exited with code {process.exitcode}; start the sweep again",
                        file=sys.stderr,
                    )
                yield row_of(read_results(plan.file(one)), one.name)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, *_ in running.values():
            process.terminate()  # on SIGTERM a training run saves a checkpoint
        for process, *_ in running.values():
            process.join()


def _in_process(claim: Claim, plan: Plan, job: Job, share: tuple[int, int]) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches only the parent, which then stops each child once
    _use_share(*share)
    try:
        claim(plan, job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def _use_share(index: int, of: int) -> None:
    """Uses one of `of` equal parts of the processors, where there are enough: threads of several runs that share
    processors wait for each other.
    """
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) >= of:
            os.sched_setaffinity(0, allowed[index::of])


class Resumable:
    """`claim` as a job that a cluster may stop and start again; its result is a row, None, or why it was refused.

    Before its time is over, or when it is preempted, submitit signals the job (SIGUSR2). A training run then saves a
    checkpoint; the job puts itself into the queue again, and there resumes.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def __call__(self, plan: Plan, job: Job) -> Row | str | None:
        requeue, idle = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)
        asked = False

        def ask(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            if signal.getsignal(signal.SIGTERM) is idle and callable(requeue):  # nothing would be saved
                requeue(number, frame)
            else:
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGUSR2, ask)
        try:
            return self.claim(plan, job)
        except ValueError as error:
            return str(error)
        except Interrupted:
            if asked and callable(requeue):
                requeue(signal.SIGUSR2, None)  # ends the process
            raise
        finally:
            signal.signal(signal.SIGUSR2, requeue)

    def checkpoint(self, plan: Plan, job: Job) -> Any:
        """What submitit puts into the queue again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, plan, job)


def cause(state: str) -> str:
    """Why a job ended without a result: `lost`, taken away by the cluster, or `error`.

    Args:
      state: as Slurm names it.
    """
    return "lost" if state.upper().startswith(LOST_STATES) else "error"


def _submitted(
    claim: Claim, plan: Plan, todo: Sequence[Job], jobs: int, executor: str, cluster: dict[str, Any]
) -> Iterator[Row | None]:
    """As submitit jobs: on Slurm, or in processes on this machine."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError(f"executor {executor!r}: {missing_package('submitit')}") from error
    timeouts = {"slurm_max_num_timeout": RETRIES["lost"]} if executor == "slurm" else {}
    submitter = submitit.AutoExecutor(folder=plan.workdir / "submitit", cluster=executor, **timeouts)
    limits = {"slurm_array_parallelism": jobs} if executor == "slurm" else {}
    submitter.update_parameters(**{"name": "sweep", "timeout_min": 24 * 60, **limits, **cluster})
    waiting, retries = list(todo), Counter[tuple[str, str]]()
    while waiting:
        # The local executor starts all its jobs at once.
        part = waiting[: jobs if executor == "local" else None]
        waiting = waiting[len(part) :]
        submitted = submitter.map_array(Resumable(claim), [plan] * len(part), part)
        try:
            for one, job in zip(part, submitted, strict=True):
                try:
                    result = job.result()
                except Exception as error:  # it ended without a row
                    why = cause(job.state)
                    retries[one.name, why] += 1
                    again = retries[one.name, why] <= RETRIES[why]
                    print(f"job {job.job_id}: {error}", file=sys.stderr)
                    print(f"{one.name}: {why}; {'submitted again' if again else 'given up'}", file=sys.stderr)
                    waiting += [one] if again else []
                    result = None
                if isinstance(result, str):
                    raise ValueError(result)
                yield result
        except (GeneratorExit, ValueError):
            for job in submitted:
                job.cancel(check=False)
            raise
