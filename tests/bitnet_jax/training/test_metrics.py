"""The metrics file: valid JSON on every line, no duplicate rows after a resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bitnet_jax.training.metrics import MetricsLog, read_metrics


def rows(path: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["kind"]) for row in read_metrics(path)]


def write(path: Path, steps: range, resume_step: int = 0) -> None:
    with MetricsLog(path, resume_step=resume_step) as log:
        for step in steps:
            log.write(step, "train", {"loss": 1.0 / step})
            if step % 2 == 0:
                log.write(step, "valid", {"loss": 2.0})


def test_rows_after_the_restored_step_are_dropped_and_measured_again(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write(whole, range(1, 7))
    write(resumed, range(1, 6))
    with resumed.open("a") as file:
        file.write('{"step": 6, "kind": "tr')  # as a killed process leaves it
    write(resumed, range(5, 7), resume_step=4)
    assert resumed.read_bytes() == whole.read_bytes()
    assert rows(whole) == [
        (1, "train"), (2, "train"), (2, "valid"), (3, "train"), (4, "train"), (4, "valid"), (5, "train"),
        (6, "train"), (6, "valid"),
    ]  # fmt: skip


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 2))
    assert rows(path) == [(1, "train")]


def test_non_finite_numbers_become_strings(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        values = {"loss": float("nan"), "layers": {"a": [float("inf"), -float("inf"), 1.0]}, "speed": None}
        log.write(1, "train", values)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {
        "step": 1, "kind": "train", "loss": "nan", "layers": {"a": ["inf", "-inf", 1.0]}, "speed": None
    }  # fmt: skip


def test_lines_that_are_not_rows_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "kind": "train"}\n\xff\xfe\n[1]\n{"kind": "x"}\n\n{"step": 2, "kind": "train"}\n'
    )
    assert rows(path) == [(1, "train"), (2, "train")]


def test_rows_are_on_disk_after_flush(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, "train", {})
        log.flush()
        assert rows(path) == [(1, "train")]


def test_tensorboard_gets_finite_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        calls: list[object] = []

        def __init__(self, folder: str, purge_step: int):
            self.calls.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.calls.append((name, value, step))

        def close(self) -> None:
            self.calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    sys.modules["tensorboardX"].SummaryWriter = Writer
    with MetricsLog(tmp_path / "m.jsonl", resume_step=2, tensorboard=tmp_path / "board") as log:
        log.write(3, "train", {"loss": 0.5, "bad": float("nan"), "layers": {}})
    assert Writer.calls == [("board", 3), ("train/loss", 0.5, 3), "closed"]


def test_tensorboard_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path / "board")
