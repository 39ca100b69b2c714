"""A few hundred cases of fuzz_packed_folders.py; the full number runs as its docstring says."""

from __future__ import annotations

from pathlib import Path

from tests.robustness.fuzz_packed_folders import CHANGES, fuzz


def test_a_hostile_author_gets_a_valid_model_or_a_refusal(tmp_path: Path) -> None:
    found = fuzz(300, seed=7, place=tmp_path)
    assert found["faults"] == []
    outcomes = found["outcomes"]
    assert set(outcomes) == set(CHANGES)
    assert all(counts.get("refused", 0) > 0 for counts in outcomes.values())
    assert (
        sum(counts.get("loaded", 0) for counts in outcomes.values()) > 20
    )  # changes that leave a valid model
