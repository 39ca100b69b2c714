"""A study from sweep to report, on a text made here; resuming, failures and damaged results included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import report, sweep
from experiments.study import Study, load_study, read_results

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="base"):
    model = dict(vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, max_length=8,
                 precision="float32")
    return ConfigDict(dict(
        seed=0,
        model=model,
        data=dict(source={text!r}, tokenizer="byte", split="tail", valid_fraction=0.2,
                  length=8, batch_size=2),
        optimizer=dict(learning_rate=1e-2),
        training=dict(steps=4, log_every=2, eval_every=2, checkpoint_every=4),
        evaluation=dict(batches=1, batch_size=2),
    ))
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "config.py").write_text(CONFIG.format(text=str(tmp_path / "text.txt")))
    monkeypatch.setattr("experiments.study.STUDIES", tmp_path / "studies")
    arms = {"float32": {"model.precision": "float32"}, "broken": {"model.precision": "no_such_recipe"}}
    return Study("toy", str(tmp_path / "config.py"), "valid_loss", "float32", arms, (0, 1))


def test_sweep_records_failures_resumes_and_reports(study: Study, tmp_path: Path) -> None:
    results = sweep.sweep(study, tmp_path / "work", small=False)
    rows = read_results(results)
    assert [(row["run"], row["status"]) for row in rows] == [
        ("float32-seed0", "finished"),
        ("broken-seed0", "failed"),
        ("float32-seed1", "finished"),
        ("broken-seed1", "failed"),
    ]
    assert "no_such_recipe" in rows[1]["error"]
    assert [point["step"] for point in rows[0]["history"]] == [2, 4]
    assert rows[0]["valid_loss"] == rows[0]["history"][-1]["valid_loss"] != rows[2]["valid_loss"]

    # A crash while the third row was written: only the runs without a whole row are repeated.
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:2]) + lines[2][:40])
    sweep.sweep(study, tmp_path / "work", small=False)
    again = read_results(results)
    assert [row["run"] for row in again] == [row["run"] for row in rows]
    assert again[0] == rows[0]
    assert again[2]["valid_loss"] == rows[2]["valid_loss"]

    text = report.report(study, results, results.parent)
    mean = (rows[0]["valid_loss"] + rows[2]["valid_loss"]) / 2
    assert f"| float32 | 2 | {mean:.4f} ±" in text
    assert "| broken | 0 | failed, failed |" in text
    assert (results.parent / "curves.png").stat().st_size > 1000


def test_report_replaces_only_its_table(study: Study, tmp_path: Path) -> None:
    row = {
        "run": "float32-seed0", "arm": "float32", "seed": 0, "status": "finished", "valid_loss": 1.5, "parameters": 10,
        "wall_seconds": 1.0, "history": [{"step": 1, "valid_loss": 1.5}], "commit": "abc", "hardware": "h", "jax": "0",
    }  # fmt: skip
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "README.md").write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    report.report(study, tmp_path / "results.jsonl", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "1.5000 (one seed)" in text


def test_interval_is_students() -> None:
    # t(0.975, 2) = 4.302653; standard error of 1, 2, 3 is 1 / sqrt(3)
    assert report.mean_interval([1.0, 2.0, 3.0]) == "2.0000 ± 2.4841"


def test_errors_name_what_there_is(tmp_path: Path, study: Study) -> None:
    with pytest.raises(ValueError, match="got study 'nothing', expected one of"):
        load_study("nothing")
    with pytest.raises(ValueError, match="has no results; run: python -m experiments.sweep --study=toy"):
        report.report(study, tmp_path / "results.jsonl", tmp_path)
    (tmp_path / "results.jsonl").write_text("not json\n{}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:1 is not JSON"):
        read_results(tmp_path / "results.jsonl")


def test_the_committed_study_loads() -> None:
    committed = load_study("ternary_penalty")
    assert committed.runs()["binary-seed1337"] == ("binary", 1337)
