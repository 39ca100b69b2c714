"""Runs whose layers are scanned over: their files are those of any run, and the setting may change on resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.load import load_run
from bitnet_jax.training.loop import fit


@pytest.mark.slow
def test_a_run_goes_on_with_or_without_a_scan(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def config(steps: int, scan: bool) -> RunConfig:
        return run_config(
            model={"num_layers": 2},
            optimizer={"schedule": "constant", "weight_decay_until": 1.0, "clip_norm": None},
            training={"steps": steps, "scan_layers": scan, "eval_every": 4, "checkpoint_every": 2},
        )

    whole = fit(config(4, False), tmp_path / "whole", progress=False)
    for steps, scan in ((2, True), (3, False), (4, True)):
        parts = fit(config(steps, scan), tmp_path / "parts", progress=False)
    assert parts["step"] == 4
    np.testing.assert_allclose(parts["valid"]["loss"], whole["valid"]["loss"], rtol=1e-6)
    *_, params, _ = load_run(tmp_path / "parts")
    *_, expected, _ = load_run(tmp_path / "whole")
    assert params.keys() == expected.keys() >= {"layers_0", "layers_1"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, expected)


def test_only_text_models_are_scanned() -> None:
    with pytest.raises(ValueError, match="training.scan_layers: got True with task 'images'"):
        RunConfig.from_dict(
            {"task": "images", "model": {"architecture": "mlp"}, "training": {"scan_layers": True}}
        )


def test_the_hash_of_a_run_without_a_scan_has_not_changed(run_config: Callable[..., RunConfig]) -> None:
    plain, scanned = run_config(), run_config(training={"scan_layers": True})
    assert plain.hash() != scanned.hash()
    fields = plain.to_dict()
    del fields["training"]["scan_layers"]
    assert RunConfig.from_dict(fields).hash() == plain.hash()
