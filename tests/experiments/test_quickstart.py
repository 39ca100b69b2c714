"""The quickstart's steps on a small text with small models, and its report from known figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitnet_experiments.configs import quickstart as quickstart_config
from bitnet_jax.data import Document, Documents
from bitnet_jax.training.metrics import read_metrics
from experiments import quickstart


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    original = quickstart_config.get_config

    def get_config(variant: str = "base", *args: Any, **fields: Any) -> Any:
        config = original("short", *args, **fields)
        config.model.update({"hidden_size": 32, "num_layers": 1, "ffn_size": 32, "max_length": 192})
        config.data.update({"length": 32, "batch_size": 2})
        config.training.update({"steps": 4, "eval_every": 2, "checkpoint_every": 4, "log_every": 2})
        config.evaluation.update({"batches": 1, "batch_size": 2})
        return config

    documents = Documents(  # a fraction of which is held out by a hash of the content
        tuple(Document(f"{i}", f"def number_{i}(self, x):\n    return x + {i * i}\n" * 20) for i in range(60))
    )
    read = quickstart.read_documents
    monkeypatch.setattr(
        quickstart, "read_documents", lambda source: documents if source == "stdlib" else read(source)
    )
    monkeypatch.setattr(quickstart_config, "get_config", get_config)
    monkeypatch.setattr(quickstart_config, "VOCAB_SIZE", 280)
    monkeypatch.setattr(quickstart, "RECIPES", {"float32": "float32", "binary": "bitnet"})  # two are enough
    monkeypatch.setitem(quickstart.PRESETS, "base", "tiny")
    monkeypatch.setattr(quickstart, "PROOF_TOKENS", 64)


# `.ci/run` runs the same path as a user would, with `make quickstart QUICKSTART_FLAGS=--short`.
@pytest.mark.slow
def test_from_text_to_report(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(["--workdir", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["bits_per_byte"]) == {"float32", "binary"}
    assert summary["packed_equals_latent"] is True
    assert summary["tokens_identical"] >= 64
    assert summary["max_relative_logit_error"]["binary"] <= 1e-5
    assert summary["model_bytes"]["binary"] < summary["model_bytes"]["float32"]
    assert all(speed > 0 for speed in summary["decode_tokens_per_second"].values())
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert f"| *{summary['trigram_bits_per_byte']:.3f}* |" in report
    for name, bits in summary["bits_per_byte"].items():
        rows = read_metrics(tmp_path / "out" / name / "run" / "metrics.jsonl")
        assert [row["bits_per_byte"] for row in rows if row["kind"] == "valid"][-1] == pytest.approx(
            bits, rel=1e-5
        )
    for name in ("loss_curves.png", "quality_and_size.png"):
        assert f"]({name})" in report
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
