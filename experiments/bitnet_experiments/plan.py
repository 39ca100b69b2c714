"""What one sweep is asked to do: which arms and seeds of a study, with which settings, into which files."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitnet_experiments.freshness import standing
from bitnet_experiments.origin import same_origin
from bitnet_experiments.study import Overrides, Row, Study
from bitnet_experiments.tuning import Trial


class Job(NamedTuple):
    """One run of a sweep."""

    name: str
    arm: str
    seed: int
    values: Mapping[str, Any]  # of the fields in TUNE
    trial: bool = False  # of a search, see tuning.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Picklable, as jobs in other processes and on other machines need it."""

    study: Study
    workdir: Path  # of the runs
    folder: Path  # of the files of results
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    small: bool = False
    sets: Overrides = dataclasses.field(default_factory=dict)  # further settings of all runs
    part: tuple[int, int] = (0, 1)  # which of how many parts this process executes
    retry_failed: bool = False
    again: bool = False  # measure rows of another origin again
    mix: bool = False  # add to rows of another origin

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    @property
    def tuning(self) -> Path:
        return self.folder / "tuning.jsonl"

    def file(self, job: Job) -> Path:
        return self.tuning if job.trial else self.results

    @property
    def tuned_arms(self) -> tuple[str, ...]:
        """The arms whose searches belong to this part: final runs need all of their arm's search."""
        index, of = self.part
        return self.arms[index::of] if self.study.tune else ()

    def jobs(self, tuned: Mapping[str, Mapping[str, Any]]) -> list[Job]:
        """The final runs of this part, ordered by seed; with TUNE those of the arms in `tuned`."""
        index, of = self.part
        arms = [arm for arm in self.tuned_arms if arm in tuned] if self.study.tune else self.arms
        every = [
            Job(f"{arm}-seed{seed}", arm, seed, tuned.get(arm, {})) for seed in self.seeds for arm in arms
        ]
        return every if self.study.tune else every[index::of]

    def more(self, job: Job) -> dict[str, Any]:
        """Overrides besides those of the arm."""
        return {**job.values, **self.sets}

    def needed(self, job: Job, row: Row | None, here: Mapping[str, str]) -> bool:
        """Whether a run must be executed, given its row so far and the origin of a new one."""
        if row is None:
            return True
        found = standing(self.study, row, self.small, self.more(job))
        if found == "failed":  # unchanged, it would fail again
            return self.retry_failed or row.get("code") != here["code"]
        same = (
            same_origin(row, here) and "hardware" in here
        )  # else it is decided where the run would be executed
        return found == "stale" or (self.again and not same)

    def apart(self, rows: Iterable[Row], here: Mapping[str, str], added: Iterable[str]) -> list[Row]:
        """The rows of another origin that would stay in their file, in a block with rows of the arms `added`."""
        blocks = set(map(self.study.block_of, added))
        seeds = {*self.seeds, *self.study.tune_seeds}
        arms = {*self.arms, *map(self.study.search_arm, self.arms)}
        return [
            row
            for row in rows
            if self.study.block_of(row["arm"]) in blocks
            and not same_origin(row, here)
            and not (self.again and row["arm"] in arms and row["seed"] in seeds)
            and standing(self.study, row, self.small, {**row.get("tuned", {}), **self.sets})
            in ("done", "unhashed")
        ]


def job_of(trial: Trial) -> Job:
    return Job(trial.name, trial.arm, trial.seed, trial.values, trial=True)


def make_plan(
    study: Study,
    workdir: Path,
    *,
    folder: Path | None = None,
    small: bool = False,
    arms: Sequence[str] = (),
    seeds: int | Sequence[int] | None = None,
    sets: Overrides | None = None,
    part: tuple[int, int] = (0, 1),
    retry_failed: bool = False,
    again: bool = False,
    mix: bool = False,
) -> Plan:
    """A valid plan.

    Args:
      folder: of the files of results; None: the study's own for the full setting without `sets`, else `workdir`.
      arms: names or patterns such as `ternary*`; none: all.
      seeds: how many, or which; None: the study's.
      part: (i, n): the i-th of n equal parts of the arms and seeds; with TUNE, of the arms.

    Raises:
      ValueError: an unknown arm, an impossible part, or seeds or settings that collide with the study's tuning.
    """
    available = (study.small_arms or tuple(study.arms)) if small else tuple(study.arms)
    own = (study.small_seeds or study.seeds[:2]) if small else study.seeds
    chosen = _matching(study, available, arms)
    counted = _seeds(own, seeds)
    if clash := set(counted) & set(study.tune_seeds if study.tune else ()):
        raise ValueError(f"--seeds: got {min(clash)}, expected none of TUNE_SEEDS {study.tune_seeds}")
    if clash_fields := set(sets or ()) & set(study.tune):
        raise ValueError(f"--set: got {min(clash_fields)}, which TUNE searches for; remove one of them")
    if sets:
        study.check_takes_overrides("--set")
        if study.config is not None:
            study.settings(chosen[0], counted[0], small, sets)  # an unknown field is an error before any run
    index, of = part
    if of < 1 or not 0 <= index < of:
        raise ValueError(f"--index: got {index} of {of}, expected 0 to {max(of, 1) - 1}")
    own_folder = not small and not sets
    return Plan(
        study=study,
        workdir=workdir,
        folder=folder or (study.folder if own_folder else workdir),
        arms=chosen,
        seeds=counted,
        small=small,
        sets=dict(sets or {}),
        part=part,
        retry_failed=retry_failed,
        again=again,
        mix=mix,
    )


def _matching(study: Study, available: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if not any(_matches(arm, pattern) for arm in available):
            raise ValueError(
                f"--arms: got {pattern!r}, which no arm of {study.name} matches; expected some of "
                f"{', '.join(available)}"
            )
    return tuple(
        arm for arm in available if not patterns or any(_matches(arm, pattern) for pattern in patterns)
    )


def _matches(arm: str, pattern: str) -> bool:
    return arm == pattern or fnmatch.fnmatchcase(arm, pattern)


def _seeds(own: Sequence[int], wanted: int | Sequence[int] | None) -> tuple[int, ...]:
    """The study's seeds, or the first `wanted` of them and the integers after the largest."""
    if wanted is None:
        return tuple(own)
    if not isinstance(wanted, int):
        return tuple(dict.fromkeys(wanted))
    if wanted < 1:
        raise ValueError(f"--seeds: got {wanted}, expected at least 1")
    following = range(max(own) + 1, max(own) + 1 + wanted)
    return (*own, *following)[:wanted]
