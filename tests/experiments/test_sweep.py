"""Sweeps: failures are recorded and no run is repeated, in one process, several, or with submitit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bitnet_experiments import sweep
from bitnet_experiments.claims import Claim
from bitnet_experiments.freshness import fresh_rows, standing
from bitnet_experiments.origin import code
from bitnet_experiments.report import text_of
from bitnet_experiments.row_checks import problems
from bitnet_experiments.runs import locked
from bitnet_experiments.study import Study, read_results
from bitnet_jax.cli.main import main

pytestmark = pytest.mark.extended

ROOT = Path(__file__).parents[2]


def statuses(results: Path) -> dict[str, str]:
    rows = read_results(results)
    assert len({row["run"] for row in rows}) == len(rows)
    return {row["run"]: row["status"] for row in rows}


EXPECTED = {
    f"{arm}-seed{seed}": status
    for seed in (0, 1)
    for arm, status in (("float32", "finished"), ("broken", "failed"), ("ternary", "finished"))
}


def test_failures_are_recorded_and_completed_runs_are_kept(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = sweep.sweep(study, tmp_path / "work", small=False)
    assert statuses(results) == EXPECTED
    rows = {row["run"]: row for row in read_results(results)}
    broken, trained = rows["broken-seed0"], rows["float32-seed0"]
    assert "no_such_recipe" in broken["error"]
    assert "Traceback" in broken["traceback"]
    assert [point["step"] for point in trained["history"]] == [2, 4]
    assert (
        trained["valid_loss"] == trained["history"][-1]["valid_loss"] != rows["float32-seed1"]["valid_loss"]
    )
    assert trained["tokens"] == 4 * 16
    for field in (
        "overrides",
        "settings_hash",
        "code",
        "commit",
        "hardware",
        "parameters",
        "wall_seconds",
        "jax",
    ):
        assert trained[field]

    # Without the row of one run, only that run is repeated; its training exists and is only read.
    results.write_text("".join(json.dumps(r) + "\n" for n, r in rows.items() if n != "float32-seed0"))
    before = (tmp_path / "work" / "float32-seed0" / "result.json").stat().st_mtime_ns
    sweep.sweep(study, tmp_path / "work", small=False)
    again = {row["run"]: row for row in read_results(results)}
    assert again["float32-seed0"]["valid_loss"] == trained["valid_loss"]
    assert (tmp_path / "work" / "float32-seed0" / "result.json").stat().st_mtime_ns == before
    assert all(again[name] == rows[name] for name in rows if name != "float32-seed0")
    hashes = {name: (row["settings_hash"],) for name, row in rows.items()}

    # A failed run is repeated on request, and replaces its row.
    monkeypatch.setattr(sweep, "train", lambda config, folder: {"status": "finished", "valid_loss": 1.0})
    monkeypatch.setattr(Study, "settings", lambda *_: None)
    monkeypatch.setattr(Study, "settings_hashes", lambda self, arm, seed, *_: hashes[f"{arm}-seed{seed}"])
    sweep.sweep(study, tmp_path / "work", small=False)
    assert statuses(results) == EXPECTED
    sweep.sweep(study, tmp_path / "work", small=False, retry_failed=True)
    assert statuses(results) == {name: "finished" for name in EXPECTED}


def test_a_custom_run_function_gets_its_arguments(study: Study, tmp_path: Path) -> None:
    def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, object]:
        return {"valid_loss": 1.5, "given": [arm, seed, str(workdir), small]}

    own = dataclasses.replace(study, run=run)
    rows = read_results(sweep.sweep(own, tmp_path / "work", small=True))
    assert [row["given"] for row in rows] == [["float32", 7, str(tmp_path / "work"), True]]
    assert not study.results.exists(), "small results are not written to the study"


def measuring(study: Study, calls: list[str], **changes: object) -> Study:
    """The study with a `run` that trains nothing and notes what was asked for."""

    def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, object]:
        calls.append(f"{arm}-seed{seed}")
        return {"valid_loss": float(seed)}

    return dataclasses.replace(study, run=run, **changes)


def test_stale_rows_are_measured_again_and_replaced(study: Study, tmp_path: Path) -> None:
    """A changed arm, a changed base config, a renamed arm; never a field that was added with its default."""
    calls: list[str] = []
    arms = {"float32": {}, "ternary": {"model.precision": "bitnet_b158"}}
    first = measuring(study, calls, arms=arms)
    results = sweep.sweep(first, tmp_path / "work", small=False)
    assert len(calls) == 4
    calls.clear()
    changed = measuring(study, calls, arms={**arms, "ternary": {"model.precision": "bitnet"}})
    assert [row["run"] for row in fresh_rows(changed, read_results(results))[1]] == [
        "ternary-seed0",
        "ternary-seed1",
    ]
    sweep.sweep(changed, tmp_path / "work", small=False)
    assert calls == ["ternary-seed0", "ternary-seed1"]
    assert fresh_rows(changed, read_results(results)) == (read_results(results), [])

    calls.clear()
    config = tmp_path / "config.py"
    config.write_text(config.read_text().replace("optimizer=dict(", "optimizer=dict(name='adamw', "))
    sweep.sweep(changed, tmp_path / "work", small=False)
    assert calls == [], "the hash names only what differs from a default of a later field"
    config.write_text(config.read_text().replace("steps=4", "steps=5"))
    sweep.sweep(changed, tmp_path / "work", small=False)
    assert sorted(calls) == sorted(changed.runs())

    renamed = measuring(study, calls, arms={"float32": {}, "binary": {"model.precision": "bitnet"}})
    fresh, stale = fresh_rows(renamed, read_results(results))
    assert {row["arm"] for row in fresh} == {"float32"}
    assert {row["arm"] for row in stale} == {"ternary"}


def test_rows_without_a_comparable_hash_are_judged_by_their_overrides(study: Study, tmp_path: Path) -> None:
    row = {"run": "float32-seed0", "arm": "float32", "seed": 0, "status": "finished"}
    row["overrides"] = {"seed": 0, "model.precision": "float32"}
    assert standing(study, row) == "unhashed"
    assert standing(study, row | {"overrides": {"seed": 0}}) == "stale"
    assert standing(study, row | {"config_hash": study.settings_hash("float32", 0)}) == "done"
    assert standing(study, row | {"config_hash": "0" * 12}) == "stale"
    own = measuring(study, [])
    assert standing(own, row | {"config_hash": "0" * 12}) == "unhashed", (
        "it may be of the model it started from"
    )
    assert standing(own, row | {"settings_hash": "0" * 12}) == "stale"
    without_config = dataclasses.replace(own, config=None)
    recorded = row | {"settings_hash": without_config.settings_hash("float32", 0)}
    assert standing(without_config, recorded) == "done"
    other = dataclasses.replace(without_config, arms={**study.arms, "float32": {"rounded": "int8"}})
    assert standing(other, recorded) == "stale"


def test_rows_of_one_study_have_one_origin(study: Study, tmp_path: Path) -> None:
    calls: list[str] = []
    one = measuring(study, calls)
    results = sweep.sweep(one, tmp_path / "work", small=False, seeds=1)
    text, rows = results.read_text(), read_results(results)
    assert {row["code"] for row in rows} == {code(one)}
    for field, value in (("code", "0" * 12), ("hardware", "another"), ("jax", "0.1")):
        other = [row | {field: value} for row in rows]
        results.write_text("".join(json.dumps(row) + "\n" for row in other))
        with pytest.raises(
            ValueError, match=f"3 rows of another origin .{field} {value}, now .*--again.*--mix"
        ):
            sweep.sweep(one, tmp_path / "work", small=False)
        assert read_results(results) == other

        calls.clear()
        with pytest.raises(
            ValueError, match="2 rows of another origin"
        ):  # those of the other arms would stay
            sweep.sweep(one, tmp_path / "work", small=False, again=True, arms=["ternary"])
        sweep.sweep(one, tmp_path / "work", small=False, again=True)
        assert sorted(calls) == sorted(one.runs())
        assert len({row["code"] for row in read_results(results)}) == 1

        results.write_text("".join(json.dumps(row) + "\n" for row in other))
        sweep.sweep(one, tmp_path / "work", small=False, mix=True)
        assert [row.get("mixed", False) for row in read_results(results)] == [False] * 3 + [True] * 3
    results.write_text(text)
    sweep.sweep(one, tmp_path / "work", small=False)
    assert not any("mixed" in row for row in read_results(results))


def test_only_the_rows_of_a_block_need_one_origin(study: Study, tmp_path: Path) -> None:
    first = dataclasses.replace(
        measuring(study, []), block=lambda arm: "float" if arm == "float32" else "ternary"
    )
    results = sweep.sweep(first, tmp_path / "work", small=False, seeds=1, arms=["float32"])
    elsewhere = [row | {"hardware": "another"} for row in read_results(results)]
    results.write_text("".join(json.dumps(row) + "\n" for row in elsewhere))
    with pytest.raises(ValueError, match="1 rows of another origin .hardware another"):
        sweep.sweep(first, tmp_path / "work", small=False, arms=["float32"])
    sweep.sweep(first, tmp_path / "work", small=False, arms=["ternary*"])
    rows = read_results(results)
    assert len({row["hardware"] for row in rows}) == 2
    assert not any("mixed" in row for row in rows)
    assert not any("machines" in problem for problem in problems(first, rows))
    assert "another (float)" in text_of(first, rows, [])

    moved = [row | {"hardware": "another"} if row["run"] == "ternary-seed0" else row for row in rows]
    assert any(problem.startswith("ternary: rows of 2 machines") for problem in problems(first, moved))
    contrast = Claim(says="ternary costs", contrast=("ternary", "float32"), greater_than=0)
    with pytest.raises(ValueError, match="arms of the blocks float, ternary, expected a contrast within one"):
        dataclasses.replace(first, claims=(contrast,))


def test_a_sweep_stops_when_every_arm_fails_alike(study: Study, tmp_path: Path) -> None:
    """Once each, not once per seed; the corrected code runs them all, without a clean-up."""
    calls: list[str] = []
    file = study.folder / "study.py"
    text = file.read_text()

    def broken(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, object]:
        calls.append(arm)
        raise KeyError("no field precission")

    file.write_text(text + "# typo\n")
    with pytest.raises(
        ValueError, match="every arm failed alike .KeyError: 'no field precission'.*3 more runs"
    ):
        sweep.sweep(dataclasses.replace(study, run=broken), tmp_path / "work", small=False)
    assert len(calls) == 3
    file.write_text(text + "# no typo\n")
    results = sweep.sweep(measuring(study, []), tmp_path / "work", small=False)
    assert statuses(results) == {name: "finished" for name in study.runs()}


def without(study: Study, **seconds: object) -> Study:
    """The study reduced to one arm and one seed, with fields of its config replaced."""
    return dataclasses.replace(
        study,
        arms={"float32": study.arms["float32"] | seconds},
        seeds=(0,),
        small_arms=None,
        effect="float32",
    )


def test_a_failed_run_with_corrected_settings_is_repeated(study: Study, tmp_path: Path) -> None:
    """A typo in an arm requires no manual clean-up of rows or folders."""
    wrong, right = without(study, **{"data.source": "nowhere.txt"}), without(study)
    for _ in range(2):
        results = sweep.sweep(wrong, tmp_path / "work", small=False)
        assert statuses(results) == {"float32-seed0": "failed"}
    first = results.read_text()
    sweep.sweep(wrong, tmp_path / "work", small=False)
    assert results.read_text() == first, "the same settings would fail again: repeated only on request"
    sweep.sweep(right, tmp_path / "work", small=False)
    assert statuses(results) == {"float32-seed0": "finished"}


def test_a_corrected_typo_in_the_base_config_repeats_the_run(study: Study, tmp_path: Path) -> None:
    one, config = without(study), tmp_path / "config.py"
    text = config.read_text()
    config.write_text(text.replace("text.txt", "nowhere.txt"))
    results = sweep.sweep(one, tmp_path / "work", small=False)
    assert statuses(results) == {"float32-seed0": "failed"}
    config.write_text("def get_config(:")
    sweep.sweep(one, tmp_path / "work", small=False)
    (row,) = read_results(results)
    assert "config.py:1: SyntaxError" in row["error"]
    config.write_text(text)
    sweep.sweep(one, tmp_path / "work", small=False)
    assert statuses(results) == {"float32-seed0": "finished"}


def test_two_concurrent_sweeps_share_the_runs(study: Study, tmp_path: Path) -> None:
    done: list[str] = []

    def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, float]:
        done.append(f"{arm}-seed{seed}")
        time.sleep(0.05)
        return {"valid_loss": float(seed)}

    own = dataclasses.replace(study, run=run)
    sweeps = [threading.Thread(target=sweep.sweep, args=(own, tmp_path / "work", False)) for _ in range(2)]
    for thread in sweeps:
        thread.start()
    for thread in sweeps:
        thread.join()
    assert sorted(done) == sorted(study.runs()), "each once"
    assert statuses(study.results) == {name: "finished" for name in study.runs()}
    with locked(study.folder / ".locks" / "float32-seed0", wait=False) as mine:
        assert mine, "no lock outlives its sweep"


SLEEPER = """
import time

def run(arm, seed, workdir, small):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / f"{{arm}}-{{seed}}").touch()
    time.sleep({seconds})
    return {{"valid_loss": 1.0}}
"""


def test_parallel_runs_in_processes(study: Study, tmp_path: Path) -> None:
    file = study.folder / "study.py"
    file.write_text(file.read_text() + SLEEPER.format(seconds=0.2))
    one_seed = dataclasses.replace(study, seeds=(0,))
    results = sweep.sweep(one_seed, tmp_path / "work", small=False, jobs=3)
    assert statuses(results) == {name: "finished" for name in one_seed.runs()}


def test_a_killed_sweep_stops_its_processes_and_leaves_no_rows(study: Study, tmp_path: Path) -> None:
    file = study.folder / "study.py"
    file.write_text(file.read_text() + SLEEPER.format(seconds=600))
    code = (
        "from pathlib import Path\nfrom bitnet_experiments import study, sweep\n"
        "if __name__ == '__main__':\n"
        f"    toy = study.read_study(Path({str(study.folder)!r}))\n"
        f"    sweep.sweep(toy, Path({str(tmp_path / 'work')!r}), False, jobs=2)\n"
    )
    (tmp_path / "main.py").write_text(code)
    roots = (ROOT, ROOT / "kernels", ROOT / "experiments")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))}
    process = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=environment)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "work").glob("*-0"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert read_results(study.results) == []
    for name in ("float32-seed0", "broken-seed0"):
        with locked(study.folder / ".locks" / name, wait=False) as mine:
            assert mine, "the children have exited and released their locks"


def test_runs_with_submitit(study: Study, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="no package submitit: pip install submitit")
    file = study.folder / "study.py"
    file.write_text(file.read_text() + SLEEPER.format(seconds=0))
    results = sweep.sweep(study, tmp_path / "work", small=True, executor="local", cluster={"timeout_min": 5})
    assert statuses(results) == {"float32-seed7": "finished"}


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", ["nothing"], "study: got 'nothing', expected one of toy or a folder with study.py"),
        ("x = y", ["toy"], "study.py:{line}: NameError"),
        ("raise SystemExit(3)", ["toy"], "study.py:{line}: SystemExit: 3"),
        ("CONFIG = 'nowhere.py'", ["toy", "--workdir={tmp_path}/file"], "Not a directory"),
        (
            "",
            ["toy", "--arms=nix"],
            "--arms: got 'nix', which no arm of toy matches; expected some of float32",
        ),
        ("", ["toy", "--index=2", "--of=2"], "--index: got 2 of 2, expected 0 to 1"),
        ("", ["toy", "--seeds=x"], "--seeds: got 'x', expected a number such as 5, or seeds such as 0,1,2"),
        ("", ["toy", "--seeds=0"], "--seeds: got 0, expected at least 1"),
        ("", ["toy", "--set=training"], "--set: got 'training', expected NAME=VALUE"),
        ("", ["toy", "--set=training.stepz=3"], "field of training: got 'stepz'"),
        (
            "def run(arm, seed, workdir, small): ...",
            ["toy", "--set=training.steps=3"],
            "got --set, but run(arm, seed, workdir, small) takes no further settings; add the parameter overrides",
        ),
    ],
)
def test_invalid_input_is_a_one_line_error_with_exit_code_2(
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("bitnet_experiments.study.STUDIES", study.folder.parent)
    file = study.folder / "study.py"
    file.write_text(f"{file.read_text()}{text}\n")
    (tmp_path / "file").touch()
    line = len(file.read_text().splitlines())
    assert main(["sweep", *(word.format(tmp_path=tmp_path) for word in arguments), "--small"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message.format(line=line) in error


QUICK = """
def run(arm, seed, workdir, small, overrides):
    return {"valid_loss": float(seed), "given": dict(overrides)}
"""


def test_a_part_of_a_study_anywhere(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen arms and seeds, job arrays, changed settings: what runs, and into which file."""
    monkeypatch.chdir(tmp_path)
    file = study.folder / "study.py"
    file.write_text(file.read_text() + QUICK)

    def run(*arguments: str) -> dict[str, dict[str, object]]:
        assert main(["sweep", str(study.folder), *arguments]) == 0
        return {row["run"]: row for row in read_results(Path(capsys.readouterr().out.strip()))}

    assert set(run("--arms", "float32,tern*", "--seeds", "1")) == {"float32-seed0", "ternary-seed0"}
    assert set(run("--arms", "ternary", "--seeds", "3,")) == {
        "float32-seed0",
        "ternary-seed0",
        "ternary-seed3",
    }
    assert set(read_results(study.results)[0]) > {"run", "settings_hash", "code", "hardware"}

    changed = run("--set", "training.steps=3", "--set", "data.split=document", "--seeds", "3")
    assert len(changed) == 3 * 3
    assert changed["broken-seed2"]["given"] == {"training.steps": 3, "data.split": "document"}
    assert len(read_results(study.results)) == 3, "rows with other settings are not of the study"
    (work,) = (tmp_path / "runs" / "studies").glob("toy-set-*")
    assert (work / "results.jsonl").is_file()

    parts = [set(run("--index", str(i), "--of", "4", "--workdir", f"part{i}")) for i in range(4)]
    assert set.union(*parts) == set(study.runs())
    assert sum(map(len, parts)) == len(study.runs())

    assert main(["sweep", str(study.folder), "--status", "--json", "status.json"]) == 0
    told = capsys.readouterr().out
    figures = json.loads((tmp_path / "status.json").read_text())
    assert figures["arms"]["ternary"] == {"done": 1, "unhashed": 0, "stale": 0, "failed": 0, "missing": 1}
    assert figures["unused"] == 1
    assert "1 row of arms or seeds that are not asked for" in told
    assert (
        f"from 1: 3 rows of commit {figures['origins'] and read_results(study.results)[0]['commit']}" in told
    )


def test_without_submitit_the_error_says_what_to_install(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install submitit"):
        sweep.sweep(study, tmp_path / "work", small=True, executor="slurm")
