"""The rule and the table of the question whether the kernels of training change losses."""

from __future__ import annotations

import json
from pathlib import Path

from experiments import unchanged_loss
from experiments.unchanged_loss import LEVEL, compared, markdown

STUDY = Path(unchanged_loss.__file__).parent / "studies" / "training_speed"


def test_a_shift_larger_than_the_spread_of_seeds_is_found() -> None:
    losses = {str(s): {"recorded": 2 + s / 100, "now": 2.1 + s / 90} for s in range(5)}
    found = compared(losses)
    assert found["p"] < LEVEL
    assert found["interval"].mean > 0.1
    same = {str(s): {"recorded": 2.0, "now": 2.0 + 0.01 * (-1) ** s * (s % 5)} for s in range(5)}
    assert compared(same)["p"] > 0.05


def test_the_page_has_the_table_and_the_rule_holds() -> None:
    results = json.loads((STUDY / "unchanged_loss.json").read_text())
    assert markdown(results) in (STUDY / "README.md").read_text()
    assert list(results["losses"]) == list(unchanged_loss.ARMS)
    assert all(compared(losses)["p"] > LEVEL for losses in results["losses"].values())
