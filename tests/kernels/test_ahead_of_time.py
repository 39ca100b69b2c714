"""Ahead-of-time compilation: the committed results, their page, and clear errors without a compiler."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bitnet_kernels import FORMATS, ahead_of_time

STUDY = Path(__file__).parents[2] / "experiments" / "studies" / "chip_compile"


@pytest.mark.parametrize(("file", "layout"), [("tpu.json", "column"), ("gpu.json", "plane")])
def test_the_page_matches_the_committed_results(file: str, layout: str) -> None:
    rows = json.loads((STUDY / file).read_text())["rows"]
    assert ahead_of_time.table(rows) in (STUDY / "README.md").read_text()
    assert {row["format"] for row in rows} == {
        name for name, form in FORMATS.items() if layout in form.layouts
    }


def test_a_failure_is_counted() -> None:
    good = {"chip": "v5e", "format": "binary", "compiled": True, "seconds": 2.0, "temporary_bytes": 3_000_000}
    bad = {"chip": "v5e", "format": "binary", "compiled": False, "error": "no"}
    assert "| v5e | binary | 1 of 2 | 2.0 | 3.0 |" in ahead_of_time.table([good, bad])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_a_compiler_the_error_says_what_to_install() -> None:
    with pytest.raises(RuntimeError, match="cannot compile for v5e: install libtpu"):
        ahead_of_time.device("v5e")
