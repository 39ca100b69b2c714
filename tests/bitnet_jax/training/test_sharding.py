"""Meshes and shardings; complete runs on the two devices of the test process, updates on eight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bitnet_jax.models import PRESETS
from bitnet_jax.training import Interrupted, RunConfig
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.loop import train
from bitnet_jax.training.run_folder import RunFolder
from bitnet_jax.training.sharding import MeshConfig, make_mesh, needs_synchronous_dispatch, partition_spec
from bitnet_jax.training.task import Task, abstract_variables

pytestmark = pytest.mark.extended

SIZES = {"data": 2, "fsdp": 4, "tensor": 8}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("params/layers_0/attention/q_proj/weight", (64, 32), P("tensor", "fsdp")),
        ("opt_state/1/mu/layers_0/mlp/gate_proj/weight", (64, 32), P("tensor", "fsdp")),
        ("params/layers_0/attention/o_proj/weight", (32, 64), P("fsdp", "tensor")),
        ("layers_11/mlp/down_proj/weight", (32, 64), P("fsdp", "tensor")),
        ("embed/embedding", (256, 32), P("tensor", "fsdp")),
        ("lm_head/weight", (256, 32), P("tensor", "fsdp")),
        ("lm_head/weight", (257, 32), P(None, "fsdp")),
        ("layers_0/attention/q_proj/weight", (64, 34), P("tensor", None)),
        ("layers_0/attention/q_proj/weight_scale", (1, 1), P(None, None)),
        ("layers_0/attention/q_proj/weight_scale", (64, 1), P("tensor", None)),
        ("layers_0/mlp/down_proj/weight_scale", (32, 8), P("fsdp", "tensor")),
        ("layers_0/attention/q_proj/bias", (64,), P()),
        ("final_norm/scale", (32,), P()),
        ("opt_state/1/count", (), P()),
        ("weight", (64, 32), P("tensor", "fsdp")),
    ],
)
def test_only_matrices_are_sharded_and_only_where_sizes_divide(
    path: str, shape: tuple[int, ...], expected: P
) -> None:
    assert partition_spec(path, shape, SIZES) == expected


def test_all_matrices_of_a_large_model_are_sharded_over_tensor_and_fsdp() -> None:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(PRESETS["7b"]))
    for path, leaf in leaves:
        spec = partition_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, SIZES)
        assert set(spec) == ({"fsdp", "tensor"} if len(leaf.shape) == 2 else set()), path


def test_a_mesh_larger_than_the_number_of_devices_is_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"mesh: got data=2, fsdp=2, context=1, tensor=16, which is 64 .* at most the 2 "
    ):
        make_mesh(MeshConfig(data=2, fsdp=2, tensor=16), jax.devices()[:2])


def test_a_mesh_uses_the_first_devices() -> None:
    assert make_mesh(MeshConfig()).devices.flatten().tolist() == jax.devices()[:1]
    both = make_mesh(MeshConfig(fsdp=2))
    assert dict(both.shape) == {"data": 1, "fsdp": 2, "context": 1, "tensor": 1}
    assert needs_synchronous_dispatch(both)
    assert not needs_synchronous_dispatch(make_mesh(MeshConfig()))


def test_a_run_may_resume_on_another_mesh(
    toy: Task, tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    def start(folder: str, task: Task, **mesh: int) -> dict[str, object]:
        config = run_config(training=dict(steps=6), mesh=mesh)
        run = RunFolder(tmp_path / folder)
        with run.training(config):
            return train(task, config, run, progress=False)

    def stop_at_three(step: int) -> dict[str, np.ndarray]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.train_batch(step)

    whole = start("whole", toy)
    with pytest.raises(Interrupted):
        start("moved", toy._replace(train_batch=stop_at_three), fsdp=2)
    moved = start("moved", toy, data=2)
    assert (whole["mesh"], moved["mesh"]) == (
        {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
        {"data": 2, "fsdp": 1, "context": 1, "tensor": 1},
    )
    assert whole["config_hash"] == moved["config_hash"]
    shapes = jax.eval_shape(toy.init, jax.random.key(0))
    ends = []
    for folder in ("whole", "moved"):
        with Checkpoints(tmp_path / folder / "checkpoints", read_only=True) as checkpoints:
            ends.append(checkpoints.restore(shapes, step=6).variables)
    # the order of float32 sums, after Adam with a learning rate of 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *ends)


@pytest.mark.slow  # half a minute; the tests above run on two devices
def test_updates_on_eight_devices(repository: Path, request: pytest.FixtureRequest) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    file = Path(__file__).with_name("on_eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    slow = request.config.getoption("--run-slow") or os.environ.get("BITNET_JAX_RUN_SLOW") == "1"
    command += ["--run-slow"] * slow
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert ("4 passed" if slow else "3 passed, 1 skipped") in done.stdout
