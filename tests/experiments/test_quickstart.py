"""The quickstart's steps on a text and models made small here, and its report from known figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitnet_experiments.configs import quickstart as quickstart_config
from experiments import quickstart


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):  # documents of which a share is held out by a hash of their content
        (text / f"{i}.txt").write_text(f"def number_{i}(self, x):\n    return x + {i}\n" * 20)
    original = quickstart_config.get_config

    def get_config(variant: str = "base") -> object:
        config = original("short")
        config.model.update({"hidden_size": 32, "num_layers": 1, "ffn_size": 32, "max_length": 192})
        config.data.update({"source": str(text), "valid_fraction": 0.3, "length": 16, "batch_size": 2})
        config.training.update({"steps": 4, "eval_every": 2, "checkpoint_every": 4, "log_every": 2})
        config.evaluation.batches = 1
        return config

    monkeypatch.setattr(quickstart_config, "get_config", get_config)
    monkeypatch.setattr(quickstart_config, "held_out_tokens", lambda variant: 256)
    monkeypatch.setattr(quickstart, "RECIPES", {"float32": "float32", "binary": "bitnet"})  # two say as much
    monkeypatch.setattr(quickstart, "PROOF_TOKENS", 64)
    monkeypatch.setattr(quickstart, "SPEED_TOKENS", 8)
    monkeypatch.setattr(quickstart, "SAMPLE_TOKENS", 8)


def test_from_text_to_report(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(["--workdir", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["bits_per_byte"]) == {"float32", "binary"}
    assert summary["packed_equals_latent"] is True
    assert summary["tokens_identical"] >= 64
    assert summary["max_relative_logit_error"]["binary"] <= 1e-5
    assert summary["model_bytes"]["binary"] < summary["model_bytes"]["float32"]
    assert all(speed["packed"] > 0 for speed in summary["decode_tokens_per_second"].values())
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert f"needs {summary['trigram_bits_per_byte']:.3f} bits per byte" in report
    for name in ("loss_curves.png", "quality_and_size.png"):
        assert f"]({name})" in report
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
