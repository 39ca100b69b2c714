"""Two starts on a small text: the second one finds the tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import data_at_size


@pytest.mark.slow
def test_both_starts_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "rows.json"
    arguments = ["data_at_size", "--megabytes", "0.2", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):
        data_at_size.main()
    rows = json.loads(target.read_text())
    assert len(rows) == 2
    for row in rows:
        assert row["text_bytes"] >= 200_000
        for start in ("first_start", "restart"):
            assert row[start]["peak_resident_bytes"] > 1e8
            assert row[start]["processor_seconds_to_first_update"] > 0


def test_the_table_of_the_study_is_that_of_its_results() -> None:
    study = Path(data_at_size.__file__).parent / "studies" / "data_at_size"
    rows = json.loads((study / "results.json").read_text())
    assert data_at_size.markdown(rows) in (study / "README.md").read_text()
