"""The study of several processes; tests/bitnet_jax/training/test_processes.py starts them."""

from __future__ import annotations

import json
from pathlib import Path

from experiments import several_processes

STUDY = Path(several_processes.__file__).parent / "studies" / "several_processes"


def test_the_page_is_that_of_its_results() -> None:
    results = json.loads((STUDY / "results.json").read_text())
    assert several_processes.markdown(results) in (STUDY / "README.md").read_text()
    first = {"float32": 1e-6, "bitnet_b158": 1e-4}  # the rule of the page
    for run in results["runs"]:
        assert run["two_processes_bit_identical_to_two_devices"]
        assert run["first_loss_against_one_device"] <= first[run["precision"]]
