"""Equal tuning: every arm gets its own best values of the fields in TUNE, searched for by one rule.

1. Every combination of the grid runs with TUNE_SEEDS. The best has the lowest mean of the validation metric; one
   with a run that failed or diverged is out of the question.
2. If the best value of a field is the least or greatest of its grid, the grid is continued there by its own factor
   and the new combinations run, at most MOST_EXTENSIONS times per field.
3. The final runs use the best values, other seeds, and report on the test data.

With --small a search has one seed, and its grid is not continued.

With TUNED_AS an arm takes its values from another arm's search: that of a small model, for models too large to search.

The state of a search is read from its rows alone (tuning.jsonl), so that it resumes anywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bitnet_experiments.study import Overrides, Row, Study, read_results

MOST_EXTENSIONS = 4  # values added to the grid of a field
DIGITS = 6  # significant, of added values


class Trial(NamedTuple):
    name: str  # of the run
    arm: str
    seed: int
    values: dict[str, float]


class Search(NamedTuple):
    """The state of an arm's search."""

    grid: dict[str, list[float]]  # as continued so far
    trials: list[Trial]  # all that the grid asks for, measured or not
    values: dict[str, float] | None  # the best; None: trials are missing, or no combination is usable
    complete: bool
    at_edge: list[str]  # fields whose best value is still at an end of its grid


def search(
    study: Study, arm: str, rows: Iterable[Row], small: bool = False, sets: Overrides | None = None
) -> Search:
    """The state of the search that gives an arm's values, from the rows of trials so far; stale rows do not count.

    Args:
      sets: overrides of all runs, see `bitnet-jax sweep --set`.
    """
    arm, by_name = study.search_arm(arm), {row["run"]: row for row in rows}
    seeds = study.tune_seeds[:1] if small else study.tune_seeds
    grid = {field: list(values) for field, values in study.tune.items()}
    losses: dict[str, float | None] = {}  # of every trial; None: not measured

    def loss(trial: Trial) -> float | None:
        row = by_name.get(trial.name)
        if row is None:
            return None
        if row.get("settings_hash") != study.settings_hash(
            arm, trial.seed, small, {**trial.values, **(sets or {})}
        ):
            return None
        if row["status"] != "finished":
            return math.inf
        if row.get(study.tuned_by) is None:
            raise ValueError(
                f"{study.name}: {row['run']} has no {study.tuned_by}, expected it beside {study.metric}; let `run` "
                "return both"
            )
        return float(row[study.tuned_by])

    while True:
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        trials = [
            [Trial(trial_name(arm, point, seed), arm, seed, point) for seed in seeds] for point in points
        ]
        means = []
        for group in trials:
            for trial in group:
                if trial.name not in losses:
                    losses[trial.name] = loss(trial)
            found = [one for trial in group if (one := losses[trial.name]) is not None]
            means.append(sum(found) / len(found) if len(found) == len(group) else None)
        everything = [trial for group in trials for trial in group]
        known = [mean for mean in means if mean is not None]
        if len(known) < len(means):
            return Search(grid, everything, None, False, [])
        if min(known) == math.inf:
            return Search(grid, everything, None, True, [])
        best = points[known.index(min(known))]
        ends = [field for field, values in grid.items() if best[field] in (values[0], values[-1])]
        if small or not any([_extend(grid[field], best[field], len(study.tune[field])) for field in ends]):
            return Search(grid, everything, best, True, ends)


def _extend(grid: list[float], best: float, given: int) -> bool:
    """Continues a grid by its factor at the end where the best value is, if it may."""
    if len(grid) - given >= MOST_EXTENSIONS:
        return False
    first = best == grid[0]
    end, before = (grid[0], grid[1]) if first else (grid[-1], grid[-2])
    added: float = float(f"{end * end / before:.{DIGITS}g}")
    if all(isinstance(value, int) for value in grid):
        added = round(added)
    if added <= 0 or added in grid:
        return False
    grid.insert(0 if first else len(grid), added)
    return True


def trial_name(arm: str, values: Mapping[str, float], seed: int) -> str:
    named = "-".join(f"{field.rpartition('.')[2]}={value}" for field, value in values.items())
    return f"{arm}-{named}-seed{seed}"


def searches(study: Study, tuning: Path | None = None) -> dict[str, Search]:
    """The state of every arm's search.

    Args:
      tuning: the file of the trials, also that of a small sweep; None: the one in the study's folder.
    """
    rows = read_results(tuning or study.folder / "tuning.jsonl")
    small = any(row.get("small") for row in rows)
    return {arm: search(study, arm, rows, small) for arm in study.arms}


def chosen(study: Study, tuning: Path | None = None) -> dict[str, dict[str, Any]]:
    """Arm -> field of TUNE -> the value of its final runs; arms whose search is not complete are missing."""
    found = searches(study, tuning) if study.tune else {}
    return {arm: one.values for arm, one in found.items() if one.values is not None}
