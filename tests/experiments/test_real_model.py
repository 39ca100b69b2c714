"""The table of the script real_model, from results that are complete or not yet timed."""

from __future__ import annotations

from typing import Any

from experiments import real_model


def results(rows: dict[str, Any]) -> dict[str, Any]:
    provenance = {"hardware": "2 cores", "commit": "abc", "jax": "0.10.2"}
    return {
        "rows": rows, "provenance": provenance, "llama_cpp_python": None, "windows": 2, "length": 1024, "rounds": 7,
        "text": {"name": "a.txt"}, "new_tokens": 64, "prompt": 512,
    }  # fmt: skip


def test_the_table_compares_with_float32_and_shows_medians_with_percentiles() -> None:
    took = {"median": 0.5, "p10": 0.25, "p90": 1.0}
    rows = {
        "float32": {"bytes": 4_000_000, "perplexity": 10.0},
        "W4A16": {"bytes": 500_000, "perplexity": 10.25, "decode_seconds": took, "prefill_seconds": took},
    }
    lines = real_model.report(results(rows)).splitlines()
    assert "| float32 | 4.0 | 10.000 | +0.00 % | - | - |" in lines
    assert "| W4A16 | 0.5 | 10.250 | +2.50 % | 126 [63, 252] | 1024 [512, 2048] |" in lines


def test_without_float32_there_is_no_comparison() -> None:
    table = real_model.report(results({"W4A16": {"bytes": 500_000, "perplexity": 10.25}}))
    assert "| W4A16 | 0.5 | 10.250 | - | - | - |" in table
