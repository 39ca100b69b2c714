"""Throughput in the log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from bitnet_jax.progress import progress_bar
from bitnet_jax.training import recorder as recorder_module
from bitnet_jax.training.config_sections import TrainingConfig
from bitnet_jax.training.metrics import MetricsLog, read_metrics
from bitnet_jax.training.recorder import Recorder
from bitnet_jax.training.spikes import Spikes


def test_a_clock_that_goes_backwards_gives_no_negative_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((100.0, 50.0, 51.0))
    path = tmp_path / "metrics.jsonl"
    training = TrainingConfig(steps=3, log_every=1, statistics_every=1)
    with MetricsLog(path) as log, progress_bar(3, unit="step", show=False) as bar:
        recorder = Recorder(log, bar, training, (), tokens=8, last={}, spikes=Spikes(training))
        monkeypatch.setattr(recorder, "_show", lambda loss: None)
        monkeypatch.setattr(recorder_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
        for step in (1, 2, 3):
            recorder.update(step, {"loss": jnp.float32(1.0), "finite": jnp.array(True)})
    assert [row["tokens_per_second"] for row in read_metrics(path)] == [None, None, 8.0]
