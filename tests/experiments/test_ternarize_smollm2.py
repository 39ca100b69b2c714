"""The table of the script ternarize_smollm2, and its windows of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.data import ByteTokenizer
from experiments import ternarize_smollm2 as script


def row(kl: list[float], nats: list[float], **more: Any) -> dict[str, Any]:
    made = {"hardware": "2 cores", "commit": "abc", "jax": "0.10.2"}
    return {
        "texts": {"a.txt": {"kl": kl, "nats": nats, "top1": 0.5}},
        "matrix_bytes": 2_500_000,
        "provenance": made,
    } | more


def test_a_step_is_a_difference_of_windows_to_the_row_above() -> None:
    first, second = script.STEPS[:2]
    rows = {
        "float32": row([0, 0], [2.0, 2.0]),
        first: row([3.0, 5.0], [4.0, 6.0], seconds=61.2, processor_seconds=99),
        second: row([1.0, 2.0], [3.0, 3.0], blimp={"value": 0.625}),
    }
    results = {"rows": rows, "texts": {"a.txt": ""}, "calibration": {"name": "c.txt"}} | dict.fromkeys(
        ("calibration_windows", "windows", "length"), 2
    )
    lines = script.report(results).splitlines()
    assert "| float32 |  |  | 7.4 | 0.500 |" in lines
    assert f"| {first} | 4.000 ± 1.000 |  | 148.4 | 0.500 |" in lines
    assert f"| {second} | 1.500 ± 0.500 | -2.500 ± 0.500 | 20.1 | 0.500 |" in lines
    assert f"| {first} | 2.5 | 61 | 99 |  |" in lines
    assert f"| {second} | 2.5 |  |  | 62.5 % |" in lines


def test_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(chr(ord("a") + i % 26) for i in range(102)))
    found = script.evenly(str(text), ByteTokenizer(), 10, 5)
    assert found.shape == (5, 10)
    np.testing.assert_array_equal(found[1], (np.arange(19, 29) % 26 + ord("a")))  # after a separator
    with pytest.raises(ValueError, match="expected 50 windows of 10"):
        script.evenly(str(text), ByteTokenizer(), 10, 50)
