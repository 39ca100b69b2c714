"""What a study has measured, per arm, and where its rows come from: `bitnet-jax sweep STUDY --status`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bitnet_experiments.freshness import STANDINGS, standing
from bitnet_experiments.origin import origin_text
from bitnet_experiments.plan import Job, Plan, job_of
from bitnet_experiments.study import Row, read_results
from bitnet_experiments.tuning import Search, search

COLUMNS = (*STANDINGS, "missing")


class Status(NamedTuple):
    name: str
    arms: dict[str, Counter[str]]  # arm -> how many of its runs have each of COLUMNS
    trials: dict[str, Counter[str]]  # likewise of its search so far
    searches: dict[str, Search]
    origins: dict[str, Counter[str]]  # where rows are from, in words -> how many there are per arm
    unused: int  # rows of arms and seeds that are not asked for

    def figures(self) -> dict[str, Any]:
        chosen = {arm: one.values for arm, one in self.searches.items()}
        return {
            "study": self.name,
            "arms": {arm: {name: found[name] for name in COLUMNS} for arm, found in self.arms.items()},
            "trials": {arm: {name: found[name] for name in COLUMNS} for arm, found in self.trials.items()},
            "chosen": chosen,
            "origins": {where: dict(found) for where, found in self.origins.items()},
            "unused": self.unused,
        }

    def text(self) -> str:
        where = {
            arm: " ".join(str(i) for i, found in enumerate(self.origins.values(), 1) if found[arm])
            for arm in self.arms
        }
        table = [[arm, *_counts(found), where[arm]] for arm, found in self.arms.items()]
        lines = [_aligned([self.name, *COLUMNS, "from"], table)]
        if self.searches:
            own = [(arm, one) for arm, one in self.searches.items() if arm in self.trials]
            table = [[arm, *_counts(self.trials[arm]), _choice(one)] for arm, one in own]
            lines += ["", _aligned(["search", *COLUMNS, "chosen"], table)]
        lines.append("")
        for number, (place, found) in enumerate(self.origins.items(), 1):
            lines.append(f"from {number}: {_rows(found.total())} of {place}")
        if self.unused:
            lines.append(f"{_rows(self.unused)} of arms or seeds that are not asked for")
        if any(found["unhashed"] for found in self.arms.values()):
            lines.append("unhashed: no settings hash to compare; the overrides are those of now")
        return "\n".join(lines)


def status(plan: Plan) -> Status:
    """The state of the runs of a plan, all parts of it."""
    study, rows, trials = plan.study, read_results(plan.results), read_results(plan.tuning)
    searches = {arm: search(study, arm, trials, plan.small, plan.sets) for arm in plan.arms if study.tune}
    tuned = {arm: one.values for arm, one in searches.items() if one.values is not None}
    asked = {
        trial.name: trial for one in searches.values() for trial in one.trials
    }  # arms may share a search
    every = [
        Job(f"{arm}-seed{seed}", arm, seed, tuned.get(arm, {})) for seed in plan.seeds for arm in plan.arms
    ]
    return Status(
        study.name,
        _standings(plan, every, rows),
        _standings(plan, [job_of(trial) for trial in asked.values()], trials),
        searches,
        _origins(rows),
        len({row["run"] for row in rows} - {job.name for job in every}),
    )


def _origins(rows: Sequence[Row]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(origin_text(row), Counter())[row["arm"]] += 1
    return found


def _standings(plan: Plan, jobs: Sequence[Job], rows: Sequence[Row]) -> dict[str, Counter[str]]:
    by_name = {row["run"]: row for row in rows}
    found: dict[str, Counter[str]] = {job.arm: Counter() for job in jobs}
    for job in jobs:
        row = by_name.get(job.name)
        state = "missing" if row is None else standing(plan.study, row, plan.small, plan.more(job))
        found[job.arm][state] += 1
    return found


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _counts(found: Mapping[str, int]) -> list[str]:
    return [str(found[name]) if found[name] else "" for name in COLUMNS]


def _choice(one: Search) -> str:
    if one.values is None:
        return "no usable value" if one.complete else "not yet"
    named = ", ".join(f"{field}={value}" for field, value in one.values.items())
    return named + (f" (at the end of the grid: {', '.join(one.at_edge)})" if one.at_edge else "")


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [header, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    padded = [[f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)] for line in table]
    names = [f"{line[0]:{widths[0]}}" for line in table]
    return "\n".join("  ".join([name, *line[1:]]) for name, line in zip(names, padded, strict=True))
