"""The section `distributed` and its refusals; test_processes.py starts real processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

from bitnet_jax.training import RunConfig
from bitnet_jax.training.distributed import DistributedConfig, everywhere, exchange
from bitnet_jax.training.sharding import MeshConfig, make_mesh

MANUAL = dict(launch="manual", coordinator="10.0.0.1:1234", processes=2, process=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(launch="slurm"), "distributed.launch: got 'slurm', expected one of single, manual, cluster"),
        (dict(processes=2), "distributed.processes: got 2 with distributed.launch=single, expected no value"),
        (MANUAL | dict(process=None), "distributed.process: got None with distributed.launch=manual"),
        (MANUAL | dict(process=2), "distributed.process: got 2 of 2 processes, expected 0 to 1"),
        (MANUAL | dict(coordinator="10.0.0.1"), "expected HOST:PORT, such as 10.0.0.1:1234"),
        (dict(heartbeat_seconds=0), "distributed.heartbeat_seconds: got 0, expected at least 1"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


def test_the_section_is_not_part_of_the_identity_of_a_run(run_config: Callable[..., RunConfig]) -> None:
    assert run_config(distributed=MANUAL).hash() == run_config().hash()


def test_a_mesh_that_leaves_devices_of_a_process_idle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="which is 1 devices, expected all 2 devices of the 2 processes"):
        make_mesh(MeshConfig())
    assert make_mesh(MeshConfig(data=2)).size == 2


def test_one_process_decides_alone() -> None:
    def fail() -> None:
        raise KeyError("x")

    assert exchange({"a": [1]}) == [{"a": [1]}]
    marker = object()
    assert everywhere(lambda: marker) is marker
    assert everywhere(lambda: marker, only_first=True) is marker
    with pytest.raises(KeyError):
        everywhere(fail)
