"""The file that results.py writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.robustness.commands import ROOT
from tests.robustness.results import keep


def test_a_result_replaces_the_previous_one_and_contains_no_local_paths(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    keep(file, "one", {"faults": ["old"]}, 1.0)
    keep(file, "two", {"faults": []}, 2.0)
    keep(file, "one", {"faults": [f"in {sys.prefix}/lib/x.py and {ROOT}/tests/y.py"]}, 3.04)
    kept = json.loads(file.read_text())
    assert list(kept) == ["one", "two"]
    assert kept["one"]["faults"] == ["in ENVIRONMENT/lib/x.py and REPOSITORY/tests/y.py"]
    assert kept["one"]["seconds"] == 3.0
    assert str(ROOT) not in file.read_text()
