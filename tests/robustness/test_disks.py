"""Disks that are really full or read-only (a small tmpfs), and killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.packed.storage import StorageError, load_packed, save_packed
from bitnet_jax.tools.pack_model import pack_model
from bitnet_jax.training import RunConfig, RunError, fit
from tests.robustness.kill_pack import kill_often, make_run

CONFIG = ModelConfig(
    vocab_size=5000, hidden_size=64, num_layers=1, num_heads=2, ffn_size=64, max_length=16
)  # 1.3 MB, most of it the embedding


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A 2 MB file system."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def variables() -> dict[str, Any]:
    return jax.tree.map(
        lambda leaf: np.full(leaf.shape, leaf.dtype != np.uint8, leaf.dtype), packing.abstract(CONFIG)
    )


def test_a_disk_that_fills_up_during_a_write(disk: Path) -> None:
    save_packed(disk / "model", variables(), CONFIG)
    with pytest.raises(StorageError, match=r"bytes free on its disk, expected at least [\d,]+"):
        save_packed(disk / "second", variables(), CONFIG)
    remount(disk, "size=4m")
    filler = disk / "filler"

    def fill(count: int) -> None:
        with filler.open("ab", buffering=0) as file:  # as another process would meanwhile
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass

    with pytest.raises(StorageError, match=r"second cannot be written \(No space left on device\)"):
        save_packed(disk / "second", variables(), CONFIG, on_bytes=fill)
    assert sorted(entry.name for entry in disk.iterdir()) == ["filler", "model"]
    load_packed(disk / "model", verify=True)


@pytest.mark.slow
def test_every_writer_rejects_a_read_only_disk(disk: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    save_packed(disk / "model", variables(), CONFIG)
    remount(disk, "ro")
    for overwrite, name in ((False, "second"), (True, "model")):
        with pytest.raises(StorageError, match="is read-only or belongs to another user"):
            save_packed(disk / name, variables(), CONFIG, overwrite=overwrite)
    with pytest.raises(StorageError, match="is read-only or belongs to another user"):
        pack_model(run, disk / "packed", tokens=0)
    with pytest.raises(RunError, match="Read-only file system"):
        fit(run_config(tmp_path), disk / "run", progress=False)
    remount(disk, "rw")
    assert [entry.name for entry in disk.iterdir()] == ["model"]
    load_packed(disk / "model", verify=True)


def run_config(place: Path) -> RunConfig:
    fields = {
        "model": dict(hidden_size=16, ffn_size=32, num_layers=1, num_heads=2, max_length=32),
        "data": dict(
            source=str(place / "text.txt"), split="tail", valid_fraction=0.2, length=16, batch_size=2
        ),
        "training": dict(steps=3, checkpoint_every=1, eval_every=3),
        "evaluation": dict(batches=1, batch_size=2),
    }
    return RunConfig.from_dict(fields)


@pytest.mark.slow
def test_a_disk_full_at_a_checkpoint_ends_the_run_which_can_resume_later(
    disk: Path, tmp_path: Path, repository: Path
) -> None:
    (tmp_path / "text.txt").write_text("A tiny text about quantized numbers. " * 20)
    (disk / "filler").write_bytes(bytes((2 << 20) - (60 << 10)))  # leaves less than a checkpoint needs
    # A separate process: TensorStore's threads report to the event loop of the failed save after it is closed.
    code = f"""
from bitnet_jax.training import RunConfig, fit
try:
    fit(RunConfig.from_dict({run_config(tmp_path).to_dict()!r}), {str(disk / "run")!r}, progress=False)
except Exception as error:
    print(type(error).__name__, error)
"""
    roots = os.pathsep.join([str(repository), str(repository / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": roots}, capture_output=True, text=True
    )
    assert done.stdout.startswith(("CheckpointError", "RunError"))
    assert "free disk space" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list((disk / "run" / "checkpoints").iterdir())
    (disk / "filler").unlink()
    result = fit(run_config(tmp_path), disk / "run", progress=False)
    assert (result["status"], result["step"]) == ("finished", 3)


@pytest.mark.extended
@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_pack_killed_at_any_moment_leaves_complete_models_and_no_permanent_leftovers(
    tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parent.parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "kernels")]))
    found = kill_often(kills, seed=kills, place=tmp_path)
    outcomes = found["outcomes"]
    assert outcomes.get("whole", 0) + outcomes.get("absent", 0) == kills
    assert found["left_after_the_next_pack"] == ["model"]
