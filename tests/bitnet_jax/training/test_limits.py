"""Checks before training: sizes that exceed memory, and groups that cannot be packed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from bitnet_jax.models import ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.training import RunConfig, fit, limits
from bitnet_jax.training.task import abstract_variables

Config = Callable[..., RunConfig]
MODEL = dict(vocab_size=256, hidden_size=64, num_layers=1, num_heads=2, ffn_size=96, max_length=8)


def no_data(config: RunConfig) -> Any:
    raise AssertionError("the data were asked for")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"hidden_size": 2**20, "ffn_size": 2**20}},
            "GB to train .16 bytes per parameter., expected at most",
        ),
        ({"model": {"num_layers": 4096, "hidden_size": 8192, "ffn_size": 2**15}}, "GB to train"),
        ({"model": {"vocab_size": 2**31 - 1, "hidden_size": 4096}}, "GB to train"),
        ({"model": {"ffn_size": 2**31 - 1}}, "GB to train"),
        ({"data": {"batch_size": 2**40}}, "batches of 1,099,511,627,776"),
        ({"evaluation": {"batch_size": 2**40}}, "evaluation.batch_size"),
        ({"data": {"length": 2**30, "batch_size": 64}}, "GB to train"),
    ],
)
@pytest.mark.unchecked_annotations
def test_absurd_sizes_are_rejected_immediately(
    tmp_path: Path, run_config: Config, sections: dict[str, Any], message: str
) -> None:
    config = run_config(**{"model": {"precision": "float32"} | sections.pop("model", {})}, **sections)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        fit(config, tmp_path / "run", progress=False, task=no_data)
    assert time.monotonic() - began < 10
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_bound_is_below_the_memory_that_training_takes(run_config: Config) -> None:
    """The formula's parameter count against the model's; whatever it omits makes it smaller."""
    for fields in ({}, {"tie_embeddings": False}, {"position": "learned"}, {"num_classes": 3}):
        model = ModelConfig(**MODEL | fields)
        real = sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model)["params"]))
        assert 0.95 * real < limits.parameters(model) <= real


def test_the_memory_limit_is_that_of_the_devices_or_the_machine(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config()
    assert 2**27 < limits.memory_bytes(config) < 2**50
    (tmp_path / "memory.max").write_text("1000\n")
    monkeypatch.setattr(limits, "CGROUP_LIMITS", (str(tmp_path / "none"), str(tmp_path / "memory.max")))
    assert limits.memory_bytes(config) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert limits.memory_bytes(config) > 1000

    class Chip:
        platform = "tpu"

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 500}

    monkeypatch.setattr(jax, "local_devices", lambda: [Chip(), Chip(), Chip()])
    assert limits.memory_bytes(run_config(mesh=dict(data=2))) == 1000


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (
            "bitnet_b158(granularity=48)",
            "q_proj: got granularity=48 for 64 inputs, expected a group size that divides",
        ),
        ("bitnet_b158(granularity=16)", "q_proj: granularity=16 cannot be packed: .*multiple of 32 inputs"),
        (
            [["*down_proj", "int4(granularity=24)"], ["*", "float32"]],
            "down_proj: granularity=24 cannot be packed",
        ),
    ],
)
def test_groups_that_cannot_be_packed_are_rejected_before_training(
    tmp_path: Path, run_config: Config, precision: Any, message: str
) -> None:
    config = run_config(model=MODEL | {"precision": precision})
    with pytest.raises(packing.PackingError, match=message):
        fit(config, tmp_path / "run", progress=False, task=no_data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("group", [16, 32, 48, 64, 96])
def test_the_check_before_training_agrees_with_packing(group: int) -> None:
    """A granularity is rejected before training exactly where `pack` rejects the trained model."""
    config = ModelConfig(
        **MODEL, precision=(("*down_proj", f"bitnet_b158(granularity={group})"), ("*", "bitnet"))
    )
    if group in (32, 96):  # a single group of 96 is a scale per output
        packing.check_packable(config)
        packing.abstract(config)
    else:
        for check in (packing.check_packable, packing.abstract):
            with pytest.raises((packing.PackingError, ValueError), match="down_proj|granularity"):
                check(config)


def test_more_inputs_than_a_format_can_sum_exactly_are_rejected() -> None:
    config = ModelConfig(**MODEL | {"ffn_size": 2**16 + 2}, precision="int8")
    with pytest.raises(
        packing.PackingError, match="down_proj: got 65538 inputs per scale, expected at most 65536"
    ):
        packing.check_packable(config)
