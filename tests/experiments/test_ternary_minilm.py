"""The script ternary_minilm: its accuracies on vectors made by hand, its sentences and its table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from experiments import ternary_minilm as script

AXES = np.eye(3)


def test_nearest_labels_are_counted_and_ties_go_to_the_nearest() -> None:
    train = np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [0, 1.0]])
    labels = np.array([7, 8, 8, 9])
    query = np.array([[1.0, 0.0]])
    for count, expected in ((1, 7), (2, 7), (3, 8), (4, 8)):
        assert script.nearest_accuracy(train, labels, query, np.array([expected]), count) == 1


def test_a_linear_classifier_separates_directions() -> None:
    labels = np.arange(3).repeat(10)
    noise = np.random.default_rng(0).normal(0, 0.1, (30, 3))
    assert script.linear_accuracy(AXES[labels] + noise, labels, AXES, np.arange(3)) == 1
    assert script.linear_accuracy(AXES[labels] + noise, labels, AXES, np.array([1, 2, 0])) == 0


def test_every_fourth_sentence_is_a_question_with_task_text(tmp_path: Path) -> None:
    path = tmp_path / "articles.jsonl.gz"
    articles = [
        {
            "text": "One two three four five. Too short.\nOne two three four  five. Six and seven and eight more!"
        }
    ]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, articles)).encode()))
    assert sorted(script.sentences_of(str(path))) == [
        "One two three four five.",
        "Six and seven and eight more!",
    ]
    plain, mixed = (
        script.texts_of(script.Arm("int8", task_text), list("abcdefgh"), ["Q", "R"])
        for task_text in (False, True)
    )
    assert "".join(plain) == "abcdefgh"
    assert "".join(mixed) == "abcQefgR"


def test_the_table_has_shares_of_the_teacher() -> None:
    made = {"hardware": "2 cores", "commit": "abc", "bytes": 1}
    tasks = {task: {"nearest": 0.8, "linear": 0.9} for task in script.TASKS}
    student = {task: {"nearest": 0.6, "linear": 0.9} for task in script.TASKS}
    rows = {
        "float": tasks | {"bytes": 90_000_000, "provenance": made},
        "ternary, seed 0": student | {"bytes": 15_000_000, "rank_correlation": 0.9123, "train_seconds": 1800,
                                      "provenance": made},
    }  # fmt: skip
    lines = script.report({"rows": rows, "steps": 5, "sentences": 6}).splitlines()
    assert "| float | 80.0 | 90.0 | 80.0 | 90.0 |  | 90.0 |  |" in lines
    assert (
        "| ternary, seed 0 | 60.0 (75.0) | 90.0 (100.0) | 60.0 (75.0) | 90.0 (100.0) | 0.912 | 15.0 | 30 |"
        in lines
    )
