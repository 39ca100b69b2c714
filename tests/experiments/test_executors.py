"""Jobs of a cluster: they save and requeue themselves when asked to stop; lost ones are submitted again."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitnet_experiments import executors
from bitnet_experiments.executors import Resumable, cause, executed
from bitnet_experiments.plan import Job, Plan, make_plan
from bitnet_experiments.study import Study
from bitnet_jax.training.interrupt import Interrupted, stop_on_signals

JOB = Job("float32-seed0", "float32", 0, {})


@pytest.fixture
def requeued() -> Iterator[list[int]]:
    """Calls of what submitit does on SIGUSR2."""
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    yield calls
    signal.signal(signal.SIGUSR2, before)


def test_a_training_run_saves_before_its_job_is_requeued(
    study: Study, tmp_path: Path, requeued: list[int]
) -> None:
    def claim(plan: Plan, job: Job) -> None:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGUSR2)
            while request.signal is None:
                time.sleep(0.01)
            assert requeued == [], "first the checkpoint"
        raise Interrupted(143)

    plan = make_plan(study, tmp_path)
    with pytest.raises(Interrupted):
        Resumable(claim)(plan, JOB)
    assert requeued == [signal.SIGUSR2]


def test_what_saves_nothing_is_requeued_at_once(study: Study, tmp_path: Path, requeued: list[int]) -> None:
    def claim(plan: Plan, job: Job) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)

    assert Resumable(claim)(make_plan(study, tmp_path), JOB) is None
    assert requeued == [signal.SIGUSR2]


class Cluster:
    """In place of submitit: every job ends as `ends` says for its run, one entry per attempt."""

    def __init__(self, ends: dict[str, list[str]]) -> None:
        self.ends, self.cancelled = ends, 0

    def AutoExecutor(self, **options: Any) -> Any:
        return SimpleNamespace(update_parameters=lambda **parameters: None, map_array=self.submit)

    def submit(self, function: Any, plans: list[Plan], jobs: list[Job]) -> list[Any]:
        return [self.job(plan, job) for plan, job in zip(plans, jobs, strict=True)]

    def job(self, plan: Plan, job: Job) -> Any:
        state = self.ends[job.name].pop(0)

        def result() -> dict[str, Any] | str:
            if state == "REFUSED":
                return "rows of another origin"
            if state != "COMPLETED":
                raise RuntimeError(state)
            return {"run": job.name}

        return SimpleNamespace(result=result, state=state, job_id="1", cancel=self.cancel)

    def cancel(self, check: bool) -> None:
        self.cancelled += 1


def ran(study: Study, folder: Path, ends: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(sys.modules, "submitit", Cluster(ends))
    jobs = [Job(name, name, 0, {}) for name in ends]
    return list(executed(lambda plan, job: None, make_plan(study, folder), jobs, 2, "slurm", {}))


def test_jobs_are_submitted_again_within_a_budget_by_cause(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(executors.RETRIES, "lost", 3)
    ends = {
        "preempted": ["PREEMPTED", "NODE_FAIL", "TIMEOUT", "COMPLETED"],
        "broken": ["FAILED", "OUT_OF_MEMORY", "COMPLETED"],
        "unlucky": ["TIMEOUT"] * 4 + ["COMPLETED"],
        "both": ["FAILED", "PREEMPTED", "COMPLETED"],
    }
    rows = ran(study, tmp_path, ends, monkeypatch)
    assert {row["run"] for row in rows if row} == {"preempted", "both"}
    assert ends == {"preempted": [], "broken": ["COMPLETED"], "unlucky": ["COMPLETED"], "both": []}
    told = capsys.readouterr().err
    assert "broken: error; given up" in told
    assert "unlucky: lost; given up" in told
    assert cause("CANCELLED by 0") == cause("UNKNOWN") == "error"


def test_a_refused_run_ends_the_sweep_and_cancels_the_others(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"a": ["REFUSED"], "b": ["COMPLETED"]})
    monkeypatch.setitem(sys.modules, "submitit", cluster)
    jobs = [Job(name, name, 0, {}) for name in cluster.ends]
    with pytest.raises(ValueError, match="rows of another origin"):
        list(executed(lambda plan, job: None, make_plan(study, tmp_path), jobs, 2, "slurm", {}))
    assert cluster.cancelled == 2


@pytest.mark.parametrize(
    ("processors", "jobs", "shares"),
    [
        ({0, 1, 2, 3}, 2, [{0, 2}, {1, 3}]),
        ({4, 7}, 2, [{4}, {7}]),
        ({0, 1}, 3, [None, None, None]),  # too few: all are shared
    ],
)
def test_parallel_runs_share_the_processors_out(
    monkeypatch: pytest.MonkeyPatch, processors: set[int], jobs: int, shares: list[set[int] | None]
) -> None:
    used: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: processors)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, share: used.append(set(share)))
    for index, expected in enumerate(shares):
        used.clear()
        executors._use_share(index, jobs)
        assert used == ([] if expected is None else [expected])
