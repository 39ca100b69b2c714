"""Checkpoints: exact round trips, retention, and recovery from damaged ones."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax.training.checkpoints import CheckpointError, Checkpoints

OPTIMIZER = optax.scale_by_adam()


def params_at(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    weight = rng.normal(size=(16, 24)).astype(np.float32)
    weight[0, :4] = [np.nan, -0.0, np.inf, 1e-45]  # bits that arithmetic would not preserve
    return {"layer": {"weight": jnp.asarray(weight), "bias": jnp.asarray(rng.normal(size=3), jnp.bfloat16)}}


def save(checkpoints: Checkpoints, step: int, loss: float | None = None) -> None:
    params = params_at(step)
    checkpoints.save(step, params, OPTIMIZER.init(params), {"data_position": step}, loss)


def shapes() -> tuple[Any, Any]:
    return jax.eval_shape(lambda: (params_at(0), OPTIMIZER.init(params_at(0))))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def two(folder: Path) -> Path:
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    return folder


def test_round_trip_is_bit_identical(two: Path) -> None:
    with Checkpoints(two) as checkpoints:
        restored = checkpoints.restore(*shapes())
    params = params_at(2)
    assert restored.step == restored.meta["step"] == restored.meta["data_position"] == 2
    assert bits(restored.variables) == bits(params)
    assert bits(restored.opt_state) == bits(OPTIMIZER.init(params))
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(OPTIMIZER.init(params))


def test_checkpoints_of_earlier_versions_have_a_crc32_of_every_array(two: Path) -> None:
    file = two / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["checksums"]
    params = params_at(2)
    meta["crc32"] = {
        "variables": {f"layer.{name}": zlib.crc32(bits(leaf)[0]) for name, leaf in params["layer"].items()}
    }
    file.write_text(json.dumps(meta))
    with Checkpoints(two, read_only=True) as checkpoints:
        assert bits(checkpoints.restore(shapes()[0], step=2).variables) == bits(params)
        meta["crc32"]["variables"]["layer.bias"] ^= 1
        file.write_text(json.dumps(meta))
        with pytest.raises(CheckpointError, match=r"checksum of variables layer\.bias differs"):
            checkpoints.restore(shapes()[0], step=2)


def test_saving_is_safe_when_the_arrays_are_donated_immediately(folder: Path) -> None:
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    params = {"w": jnp.arange(1 << 16, dtype=jnp.float32)}
    expected = bits(params)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, params, OPTIMIZER.init(params), {})
        overwrite(params)
        checkpoints.wait()
        assert (
            bits(checkpoints.restore({"w": jax.ShapeDtypeStruct((1 << 16,), jnp.float32)}).variables)
            == expected
        )


def test_reading_only_the_parameters_of_a_given_step_changes_no_files(two: Path) -> None:
    leftover = two / "3.orbax-checkpoint-tmp"  # as left by another process that may still be writing
    leftover.mkdir()
    with Checkpoints(two, read_only=True) as checkpoints:
        restored = checkpoints.restore(shapes()[0], step=1)
        with pytest.raises(CheckpointError, match=r"no step 7; expected one of \[1, 2\]"):
            checkpoints.restore(shapes()[0], step=7)
    assert bits(restored.variables) == bits(params_at(1))
    assert restored.opt_state is None
    assert leftover.exists()


def test_the_newest_and_the_best_are_kept_across_processes(folder: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}
    for step, loss in losses.items():
        with Checkpoints(folder, keep=2, keep_best=True) as checkpoints:
            save(checkpoints, step, loss)
            checkpoints.wait()
            kept = checkpoints.steps()
    assert kept == [2, 4, 5]
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 6)
        checkpoints.wait()
        assert checkpoints.steps() == [5, 6]


def test_keeping_only_one_checkpoint_is_rejected() -> None:
    with pytest.raises(ValueError, match="keep=1: expected at least 2"):
        Checkpoints(Path("unused"), keep=1)


def test_missing_and_uncreatable_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        Checkpoints(tmp_path / "absent", read_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot create .*: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def data_files(step_folder: Path) -> Iterator[Path]:
    return (path for path in sorted(step_folder.rglob("*")) if path.is_file())


def largest(step_folder: Path) -> Path:
    return max(data_files(step_folder / "variables"), key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda step: flip_a_bit(largest(step)),
    "a truncated array": lambda step: os.truncate(largest(step), largest(step).stat().st_size // 2),
    "a missing array": lambda step: largest(step).unlink(),
    "damaged meta": lambda step: (step / "meta" / "metadata").write_text('{"step": '),
    "meta of no dict": lambda step: (step / "meta" / "metadata").write_text("[]"),
    "an empty folder": lambda step: [path.unlink() for path in data_files(step)],
}


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.usefixtures("orbax_litter")
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(
    two: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](two / "2")
    with Checkpoints(two) as checkpoints:
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(CheckpointError, match="2 cannot be used") as error,
        ):
            checkpoints.restore(*shapes())
        assert "\n" not in str(error.value)
        restored = checkpoints.restore_latest_intact(*shapes())
        assert restored is not None
        assert bits(restored.variables) == bits(params_at(1))
        assert "trying the previous checkpoint" in caplog.text
        assert (two.parent / "damaged" / "2").is_dir()
        save(checkpoints, 2)  # the step can be saved again
        checkpoints.wait()
        assert bits(checkpoints.restore(*shapes()).variables) == bits(params_at(2))


@pytest.mark.usefixtures("orbax_litter")
def test_only_damaged_checkpoints_is_an_error_and_no_checkpoint_is_a_fresh_start(
    two: Path, tmp_path: Path
) -> None:
    for step in ("1", "2"):
        flip_a_bit(largest(two / step))
    with (
        Checkpoints(two) as checkpoints,
        pytest.raises(CheckpointError, match=r"all checkpoints \(steps \[1, 2\]\)"),
    ):
        checkpoints.restore_latest_intact(*shapes())
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore_latest_intact(*shapes()) is None


@pytest.mark.usefixtures("orbax_litter")
def test_a_checkpoint_of_another_model_is_rejected(two: Path) -> None:
    other = {"layer": {"weight": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
    with Checkpoints(two) as checkpoints, pytest.raises(CheckpointError, match="cannot be used"):
        checkpoints.restore(other)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from bitnet_jax.training.checkpoints import CheckpointError, Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # larger files fail, as on a full disk
folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder)
small = {"w": np.ones(3, np.float32)}
checkpoints.save(1, small, small, {})
checkpoints.wait()
checkpoints.save(2, {"w": np.random.default_rng(0).normal(size=100_000)}, small, {})
try:
    checkpoints.wait()
except CheckpointError as error:
    print(error)
print(sorted(path.name for path in folder.iterdir()))
checkpoints.close()
"""


def test_a_full_disk_is_a_one_line_error_and_leaves_only_complete_checkpoints(
    tmp_path: Path, repository: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()
    assert error.startswith("cannot save a checkpoint in")
    assert error.endswith("free disk space or fix permissions, then start again to resume from step 1")
    assert left == "['1']"
    assert "Traceback" not in done.stderr
