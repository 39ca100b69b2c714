"""A few hundred cases of fuzz_packed_folders.py; its docstring gives the full command."""

from __future__ import annotations

from pathlib import Path

from tests.robustness.fuzz_packed_folders import CHANGES, fuzz


def test_a_fuzzed_folder_loads_a_valid_model_or_is_rejected(tmp_path: Path) -> None:
    found = fuzz(300, seed=7, place=tmp_path)
    assert found["faults"] == []
    outcomes = found["outcomes"]
    assert set(outcomes) == set(CHANGES)
    assert all(counts.get("refused", 0) > 0 for counts in outcomes.values())
    assert (
        sum(counts.get("loaded", 0) for counts in outcomes.values()) > 20
    )  # changes that leave a valid model
