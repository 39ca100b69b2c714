"""Training beside others: processes in turn, the committed table, and what a failed process says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import training_side_by_side as side_by_side
from experiments.training_side_by_side import Size, compare, markdown, table, with_mfu

STUDY = Path(__file__).parents[2] / "experiments" / "studies" / "training_speed"
TINY = Size(16, 32, 1, 2, batch=1, length=8)


@pytest.mark.slow
def test_processes_train_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "TURN_SECONDS", 0.01)
    figures = compare(TINY, side_by_side.OURS | side_by_side.PLAIN_JAX, 2, sys.executable)
    names = ["bitnet_jax float32", "bitnet_jax ternary", "plain JAX float32"]
    assert list(figures["tokens_per_second"]) == names
    assert len(set(figures["parameters"].values())) == 1  # the same model
    assert all(speed["lowest"] > 0 for speed in figures["tokens_per_second"].values())
    assert all(name in table("tiny", figures) for name in names)


def test_a_process_that_ends_is_an_error_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"PyTorch float32: the process ended: .*torch_is_not_here"):
        side_by_side._Process("PyTorch float32", [sys.executable, "-c", "import torch_is_not_here"])


def test_the_peak_is_the_highest_of_all_sizes() -> None:
    """While a core was taken from the measurement of one size, its share must not come out above one."""
    size = {"size": Size(16, 32, 1, 2)._asdict(), "tokens_per_second": {"a": {"median": 100.0}}}
    figures = {"sizes": {"x": size | {"float_peak_gflops": 50.0}, "y": size | {"float_peak_gflops": 100.0}}}
    shares = [found["mfu"]["a"] for found in with_mfu(figures)["sizes"].values()]
    assert shares[0] == shares[1] > 0
    figures["sizes"]["x"]["float_peak_gflops"] = None
    assert with_mfu(figures)["sizes"]["y"]["mfu"] is None


def test_the_table_of_the_study_is_that_of_its_results() -> None:
    for file in (STUDY / "results").glob("*.json"):
        assert markdown(json.loads(file.read_text())) in (STUDY / "README.md").read_text(), file


def test_the_memory_of_long_sequences_is_that_of_the_results() -> None:
    text = (STUDY / "README.md").read_text().replace("\n", " ")
    peaks = json.loads((STUDY / "long_sequences.json").read_text())["sizes"]["1m-long"]["peak_resident_bytes"]
    plain, floats, ternary = (
        f"{peaks[who] / 1e6:.0f} MB"
        for who in ("plain JAX float32", "bitnet_jax float32", "bitnet_jax ternary")
    )
    assert f"peak of {plain} of resident memory; here float32 takes {floats} and ternary {ternary}" in text
