"""Searches for the best values of every arm: grids, edges, resuming, and the final runs with what was chosen."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bitnet_experiments import sweep
from bitnet_experiments.freshness import fresh_rows
from bitnet_experiments.plan import make_plan
from bitnet_experiments.sections import arms_table
from bitnet_experiments.status import status
from bitnet_experiments.study import Study, read_results, read_study
from bitnet_experiments.tuning import MOST_EXTENSIONS, chosen, searches

RATE, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"
BEST = {"float32": 0.01, "ternary": 0.08}  # rates
Loss = Callable[[str, Mapping[str, float]], float]


def tuned(study: Study, calls: list[tuple[str, int]], loss: Loss, **changes: object) -> Study:
    """The study with an arm's `loss` at the values it is given, instead of training."""

    def run(
        arm: str, seed: int, workdir: Path, small: bool, overrides: Mapping[str, float]
    ) -> dict[str, object]:
        calls.append((arm, seed))
        value = loss(arm, overrides)
        if math.isinf(value):
            return {"status": "diverged"}
        return {"valid_loss": value, "test_loss": value + 1}

    fields = {
        "arms": {arm: {"model.precision": arm} for arm in BEST}
        | {"ternary": {"model.precision": "bitnet_b158"}},
        "metric": "test_loss",
        "tune": {RATE: (0.01, 0.02, 0.04)},
        "tune_seeds": (100,),
        "run": run,
        "small_arms": None,
    }
    return dataclasses.replace(study, **fields | changes)


def near(arm: str, values: Mapping[str, float]) -> float:
    return abs(math.log(values[RATE] / BEST[arm]))


def test_every_arm_gets_its_best_value_and_edges_extend_the_grid(study: Study, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    own = tuned(study, calls, near)
    results = sweep.sweep(own, tmp_path / "work", small=False)
    assert chosen(own) == {"float32": {RATE: 0.01}, "ternary": {RATE: 0.08}}
    found = searches(own)
    assert found["float32"].grid == {RATE: [0.005, 0.01, 0.02, 0.04]}
    assert found["ternary"].grid == {RATE: [0.01, 0.02, 0.04, 0.08, 0.16]}
    assert len(read_results(own.folder / "tuning.jsonl")) == 4 + 5
    rows = read_results(results)
    assert {(row["arm"], row["tuned"][RATE], row["overrides"][RATE]) for row in rows} == {
        ("float32", 0.01, 0.01), ("ternary", 0.08, 0.08),
    }  # fmt: skip
    assert [row["test_loss"] for row in rows] == [1.0] * 4
    assert calls[9:] == [("float32", 0), ("ternary", 0), ("float32", 1), ("ternary", 1)]
    assert fresh_rows(own, rows) == (rows, [])

    calls.clear()
    sweep.sweep(own, tmp_path / "work", small=False)
    assert calls == []


def test_a_search_resumes_and_another_choice_makes_the_final_rows_stale(study: Study, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    own = tuned(study, calls, near)
    results = sweep.sweep(own, tmp_path / "work", small=False)
    rows = read_results(results)
    file = own.folder / "tuning.jsonl"
    trials = read_results(file)
    lost = "ternary-learning_rate=0.04-seed100"
    file.write_text("".join(json.dumps(row) + "\n" for row in trials if row["run"] != lost))
    assert chosen(own) == {"float32": {RATE: 0.01}}, "the other arm's choice has not been made"
    assert {row["arm"] for row in fresh_rows(own, rows)[1]} == {"ternary"}
    calls.clear()
    sweep.sweep(own, tmp_path / "work", small=False)
    assert calls == [("ternary", 100)], "one trial; the choice, and with it the final rows, are the same"
    assert read_results(results) == rows

    worse = [row | ({"valid_loss": 7.0} if row["tuned"][RATE] == 0.08 else {}) for row in read_results(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in worse))
    assert chosen(own)["ternary"] == {RATE: 0.04}
    fresh, stale = fresh_rows(own, rows)
    assert {row["arm"] for row in stale} == {"ternary"}


def test_two_fields_are_searched_together_and_extended_apart(study: Study, tmp_path: Path) -> None:
    def bowl(arm: str, values: Mapping[str, float]) -> float:
        return near(arm, values) + abs(values[DECAY] - 3)

    own = tuned(
        study, [], bowl, tune={RATE: (0.02, 0.04), DECAY: (1, 2, 3)}, arms={"ternary": {}}, baseline="ternary"
    )
    sweep.sweep(own, tmp_path / "work", small=False)
    (found,) = searches(own).values()
    assert found.values == {RATE: 0.08, DECAY: 3}
    assert found.grid == {RATE: [0.02, 0.04, 0.08, 0.16], DECAY: [1, 2, 3, 4]}  # 4.5 as an integer
    assert len(found.trials) == 16
    assert found.at_edge == []


def test_extensions_are_bounded_and_divergence_is_no_choice(study: Study, tmp_path: Path) -> None:
    def falling(arm: str, values: Mapping[str, float]) -> float:
        return math.inf if arm == "ternary" or values[RATE] > 0.3 else 1 / values[RATE]

    own = tuned(study, [], falling, tune={RATE: (0.001, 0.002)})
    with pytest.raises(ValueError, match="got no finished trials of ternary with any values"):
        sweep.sweep(own, tmp_path / "work", small=False)
    found = searches(own)
    assert found["float32"].grid[RATE] == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    assert len(found["float32"].grid[RATE]) == 2 + MOST_EXTENSIONS
    assert found["float32"].at_edge == [RATE]
    assert {row["arm"] for row in read_results(own.results)} == {"float32"}


def test_arms_may_share_a_search(study: Study, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    own = tuned(study, calls, near, tuned_as=lambda arm: "float32")
    rows = read_results(sweep.sweep(own, tmp_path / "work", small=False))
    assert len(read_results(own.folder / "tuning.jsonl")) == 4
    assert chosen(own) == {"float32": {RATE: 0.01}, "ternary": {RATE: 0.01}}
    assert {(row["arm"], row["tuned"][RATE]) for row in rows} == {("float32", 0.01), ("ternary", 0.01)}
    shown = status(make_plan(own, tmp_path / "work")).text()
    assert "ternary" not in shown.partition("search")[2].partition("from 1")[0]

    calls.clear()  # one arm alone needs the other's search
    (own.folder / "tuning.jsonl").unlink()
    sweep.sweep(own, tmp_path / "work", small=False, arms=["ternary"])
    assert calls == [("float32", 100)] * 4


def test_a_small_search_is_not_continued(study: Study, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    own = tuned(study, calls, near, tune_seeds=(100, 101), seeds=(0, 1, 2), small_seeds=(0,))
    sweep.sweep(own, tmp_path / "work", small=True)
    assert calls[:-2] == [(arm, 100) for arm in BEST for _ in range(3)]  # near prefers 0.08 for the second
    found = searches(own, tmp_path / "work" / "tuning.jsonl")["ternary"]
    assert (found.grid, found.values, found.at_edge) == ({RATE: [0.01, 0.02, 0.04]}, {RATE: 0.04}, [RATE])


def test_parts_divide_the_arms(study: Study, tmp_path: Path) -> None:
    own = tuned(study, [], near)
    for index in (1, 0, 2):
        sweep.sweep(own, tmp_path / "work", small=False, part=(index, 3))
        done = {row["arm"] for row in read_results(own.results)}
        assert done == ({"ternary"} if index == 1 else {"ternary", "float32"})


@pytest.mark.slow
def test_trained_arms_choose_by_validation_and_report_the_test(study: Study, tmp_path: Path) -> None:
    file = study.folder / "study.py"
    lines = ['METRIC = "test_loss"', 'COMMON = {"data.test": True}', f"TUNE = {{{RATE!r}: (1e-3, 1e-2)}}"]
    lines += ["del ARMS['broken']", "SEEDS = (0, 1)"]
    file.write_text(file.read_text() + "\n".join(lines))
    own = read_study(study.folder)
    assert own.tune_seeds == (1000,)
    results = sweep.sweep(own, tmp_path / "work", small=True)
    (row,) = read_results(results)
    found = searches(own, tmp_path / "work" / "tuning.jsonl")["float32"]
    assert row["tuned"] == found.values
    losses = {r["tuned"][RATE]: r["valid_loss"] for r in read_results(tmp_path / "work" / "tuning.jsonl")}
    assert row["tuned"][RATE] == min(losses, key=lambda rate: losses[rate])
    assert row["test_loss"] > 0
    assert fresh_rows(own, [row], tmp_path / "work" / "tuning.jsonl") == ([row], [])
    assert not own.results.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("TUNE = {'a.b': (1, 2)}", "METRIC: got 'valid_loss' with TUNE, which chooses by validation data"),
        ("METRIC = 'test_loss'; TUNE = {'a.b': (2, 1)}", "expected at least two positive numbers, ascending"),
        (
            "METRIC = 'test_loss'; TUNE = {'a.b': (1, 2)}; TUNE_SEEDS = (1,)",
            "TUNE_SEEDS: got .1,., expected fewer",
        ),
        (
            "METRIC = 'test_loss'; TUNE = {'model.precision': (1, 2)}",
            "arm 'float32': got model.precision, which TUNE",
        ),
        (
            "METRIC = 'test_loss'; TUNE = {'a.b': (1, 2)}\ndef run(arm, seed, workdir, small): ...",
            "add the parameter overrides",
        ),
        (
            "METRIC = 'test_loss'; TUNE = {'a.b': (1, 2)}; TUNED_AS = lambda arm: 'none'",
            "TUNED_AS",
        ),
    ],
)
def test_errors_name_the_mistake(study: Study, change: str, message: str) -> None:
    file = study.folder / "study.py"
    file.write_text(f"{file.read_text()}\n{change}\n")
    with pytest.raises(ValueError, match=message):
        read_study(study.folder)


def test_a_trial_that_keeps_dying_ends_the_search(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "claim", lambda plan, job: None)
    with pytest.raises(ValueError, match="ended 3 times without a row"):
        sweep.sweep(tuned(study, [], near), tmp_path / "work", small=False)


def test_the_table_says_what_was_chosen(study: Study, tmp_path: Path) -> None:
    own = tuned(study, [], near)
    rows = read_results(sweep.sweep(own, tmp_path / "work", small=False))
    rows = [row | {"parameters": 1, "wall_seconds": 1.0} for row in rows]
    lines = arms_table()(own, rows).markdown.splitlines()
    column = lines[0].split(" | ").index("learning_rate")
    assert [line.split(" | ")[column] for line in lines[2:4]] == ["0.01", "0.08"]
