"""The benchmark runs, measures what it says, and writes the rows that others read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitnet_kernels import FORMATS, bench, cpu, validate
from bitnet_kernels.shapes import SUITES, Shape

COLUMNS = {
    "op",
    "format",
    "m",
    "n",
    "k",
    "threads",
    "implementation",
    "isa",
    "microseconds",
    "weight_bytes",
    "gbytes_per_second",
    "read_ceiling_gbytes_per_second",
    "ceiling_fraction",
    "gmacs_per_second",
    "peak_fraction",
    "speedup_vs_xla_float32",
    "speedup_vs_xla_bfloat16",
    "speedup_vs_xla_int8",
}


def test_it_writes_one_row_per_shape_and_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    bench.main(["--suite", "smoke", "--working-set", "1", "--seconds", "0.001", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["m"], row["format"]) for row in rows] == [(s.m, f) for s in SUITES["smoke"] for f in FORMATS]
    for row in rows:
        assert set(row) == COLUMNS
        took = row["microseconds"] / 1e6
        assert took > 0
        np.testing.assert_allclose(row["gmacs_per_second"], row["m"] * row["n"] * row["k"] / took / 1e9)
        np.testing.assert_allclose(row["gbytes_per_second"], row["weight_bytes"] / took / 1e9)
        if cpu.unavailable() is None:
            ceiling = row["read_ceiling_gbytes_per_second"]
            np.testing.assert_allclose(row["ceiling_fraction"], row["gbytes_per_second"] / ceiling)
            assert (row["implementation"], row["isa"]) == ("cpu", cpu.isa())
    assert {row["format"]: row["weight_bytes"] for row in rows} == {
        "binary": 256 * 512 // 8,
        "ternary2": 256 * 512 // 4,
        "ternary5": 256 * 520 // 5,  # whole blocks of 20 inputs
        "int4": 256 * 512 // 2,
        "int8": 256 * 512,
    }
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_without_a_library_the_ceiling_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    assert bench.read_ceiling(1 << 20, 0.001) is None


@pytest.mark.parametrize("format", FORMATS)
def test_its_matrices_are_valid(format: str) -> None:
    validate(bench.random_packed(format, Shape(1, 32, 160), 0))
