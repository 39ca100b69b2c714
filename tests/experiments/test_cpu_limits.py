"""The study of CPU limits: its commands parse, and its tables match its results."""

from __future__ import annotations

import pytest

from bitnet_jax.cli.main import build_parser
from bitnet_jax.models import PRESETS
from experiments import cpu_limits, training_cost

pytestmark = pytest.mark.extended


def test_the_tables_match_the_committed_results() -> None:
    machines = cpu_limits.load()
    assert cpu_limits.report(machines) == (cpu_limits.STUDY / "report.md").read_text()
    readme = cpu_limits.README.read_text()
    assert cpu_limits.with_table(readme, machines) == readme


def test_a_ceiling_of_the_former_loop_is_not_shown() -> None:
    """It was too low: results without the name of the loop come from before."""
    for results in cpu_limits.load().values():
        old = {name: f for name, f in results.items() if "decode_seconds_per_token" in f}
        for figures in old.values():
            figures.pop("read_ceiling_loop", None)
        assert " GB/s" not in "\n".join(cpu_limits._model_table(old))


@pytest.mark.parametrize("name", cpu_limits.COMMANDS)
def test_every_command_exists(name: str) -> None:
    words, _ = cpu_limits.COMMANDS[name]
    if words[:2] == ("-m", "bitnet_jax.cli"):
        build_parser().parse_args(words[2:])


@pytest.mark.slow  # compiles three training steps
def test_the_cost_of_training_is_relative_to_float32() -> None:
    every = training_cost.RECIPES | training_cost.PRODUCTS
    variants = {name: every[name] for name in ("float32", "bitnet", "ternary, int8 gradients")}
    figures = training_cost.measure(PRESETS["tiny"], variants, batch_size=1, length=8, rounds=1)
    assert set(figures["milliseconds"]) == set(figures["temporary_bytes"]) == set(variants)
    assert figures["cost_against_float32"]["float32"]["median"] == 0
    assert figures["cost_against_float32"]["bitnet"]["median"] > -1
    speeds = (figures["tokens_per_second"][name]["median"] for name in variants)
    assert min(speeds) > 0
