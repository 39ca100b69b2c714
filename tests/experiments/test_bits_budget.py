"""The script bits_budget, once on a tiny model: its rows, table, figure, and what a second call does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.tools import few_bits
from experiments import bits_budget as script
from tests.bitnet_jax.tools.float_models import TEXT, saved


def row(nbytes: int, kl: list[float], **more: Any) -> dict[str, Any]:
    text = {"kl": kl, "nats": [2.0, 2.0], "float_nats": [1.0, 1.0], "top1": 0.5}
    made = {"hardware": "2 cores", "commit": "abc", "jax": "0.10.2"}
    return {
        "bytes": nbytes, "texts": {"a.txt": text}, "seconds": 61.2, "processor_seconds": 99, "provenance": made,
    } | more  # fmt: skip


def test_a_gain_is_a_difference_to_equal_bits_in_as_many_bytes() -> None:
    same, between = "chosen, bytes of ternary", "chosen, between ternary and 4 bits"
    chosen = {"predicted_kl": 0.25, "measured_kl": 0.3, "layers": {"binary": 3, "4": 1}}
    rows = {
        same: row(1_900_000, [2.0, 3.0], **chosen),
        between: row(3_000_000, [1.0, 1.0], **chosen),
        "ternary": row(2_000_000, [3.0, 5.0]),
    }
    results = {
        "rows": rows,
        "texts": {"a.txt": ""},
        "calibration": {"name": "c.txt"},
        "source": "s",
    } | dict.fromkeys(("calibration_windows", "windows", "length"), 2)
    results |= {"embedding": "int8", "rotate": False, "predicted": {"equal": {"ternary": 4.5}}}
    lines = script.report(results).splitlines()
    assert "Float model: perplexity 2.7." in lines
    table = [line for line in lines if line.startswith("| ")][1:]
    assert table[0] == f"| {same} | 1.9 | 2.500 ± 0.500 | 1.500 ± 0.500 | 7.4 | 0.500 |"  # by bytes
    assert f"| {between} | 3.0 | 1.000 ± 0.000 |  | 7.4 | 0.500 |" in table
    assert f"| {same} | 0.25 | 0.3 | 3 0 1 0 | 61 | 99 |" in table
    assert "| ternary | 4.5 |  |  | 61 | 99 |" in table


@pytest.mark.extended
def test_once_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(few_bits, "PROOF_TOKENS", 0)
    saved(tmp_path / "float")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text("binary weights have two values. " * 9)
    rows = ["chosen, bytes of ternary", "ternary"]
    options = {
        "source": tmp_path / "float", "calibration": tmp_path / "text.txt", "texts": tmp_path / "other.txt",
        "calibration-windows": 8, "windows": 3, "length": 24, "parts": tmp_path / "parts", "study": tmp_path / "study",
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    script.main([*arguments, "--only", rows[0]])
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    seconds = results["rows"][rows[0]]["seconds"]
    script.main([*arguments, "--only", *rows])
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert list(results["rows"]) == rows
    assert results["rows"][rows[0]]["seconds"] == seconds  # kept
    chosen, equal = results["rows"].values()
    assert chosen["bytes"] <= equal["bytes"]
    assert sum(chosen["layers"].values()) == len(chosen["choice"]) == 14
    curve = results["predicted"]["curve"]
    assert min(curve["bytes"]) <= chosen["bytes"] <= max(curve["bytes"])
    assert chosen["predicted_kl"] < results["predicted"]["equal"]["ternary"]
    assert (tmp_path / "study" / "report.md").read_text() == script.report(results)
    assert (tmp_path / "study" / "pareto.png").read_bytes()[1:4] == b"PNG"
    capsys.readouterr()
    script.main(["--report", "--study", str(tmp_path / "study")])
    assert script.report(results) in capsys.readouterr().out
