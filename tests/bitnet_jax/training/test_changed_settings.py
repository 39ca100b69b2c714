"""The settings in a run's files must be those its checkpoints were trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.training import RunConfig, RunError, fit, load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    (place / "text.txt").write_text("A tiny text about quantized numbers. " * 20)
    fields = {
        "model": dict(hidden_size=16, ffn_size=32, num_layers=1, num_heads=2, max_length=32),
        "data": dict(
            source=str(place / "text.txt"), tokenizer="char", split="tail", valid_fraction=0.2, length=16,
            batch_size=2,
        ),
        "training": dict(steps=2, checkpoint_every=1),
        "evaluation": dict(batches=1, batch_size=2),
    }  # fmt: skip
    fit(RunConfig.from_dict(fields), place / "run", progress=False)
    return place / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def edit(folder: Path, section: str, **changes: Any) -> RunConfig:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields[section] |= changes
    path.write_text(json.dumps(fields))
    return RunConfig.from_dict(fields)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"rope_theta": 40_000.0}, r"model.rope_theta: 'not set', 40000.0"),
        ("model", {"precision": "bitnet"}, "model.precision"),
        ("model", {"hidden_size": 32}, "model.hidden_size: 16, 32"),
        ("data", {"length": 8}, "data.length: 16, 8"),
        ("optimizer", {"learning_rate": 0.5}, "optimizer.learning_rate"),
    ],
)
def test_settings_changed_after_training_are_errors_that_keep_the_checkpoints(
    copy: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    config = edit(copy, section, **changes)
    with pytest.raises(RunError, match=f"was changed after training .*{message}"):
        load_run(copy)
    (copy / "result.json").unlink()  # as if it had been interrupted
    with pytest.raises(RunError, match=f"was changed after training .*{message}"):
        fit(config, copy, progress=False)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir() if path.is_dir()) == ["1", "2"]
    assert not (copy / "damaged").exists()


@pytest.mark.extended
def test_settings_that_do_not_affect_the_weights_may_change(run: Path, copy: Path) -> None:
    edit(copy, "training", steps=9, log_every=3)
    edit(copy, "evaluation", batches=3)
    edit(copy, "data", root=str(copy))
    ours, theirs = (load_run(folder)[2]["embed"]["embedding"] for folder in (copy, run))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.extended
def test_another_tokenizer_of_the_same_size_is_rejected(copy: Path) -> None:
    path = copy / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["symbols"] = fields["symbols"][::-1]
    path.write_text(json.dumps(fields))
    with pytest.raises(RunError, match=r"tokenizer.json was changed or removed after training"):
        load_run(copy)
