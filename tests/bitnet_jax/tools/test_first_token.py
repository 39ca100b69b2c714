"""The time to the first token: of processes that start, and an error of one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_jax.models import PRESETS
from bitnet_jax.packed import storage
from bitnet_jax.tools import first_token
from bitnet_jax.tools.first_token import start_figures
from bitnet_jax.tools.random_model import write_random


@pytest.mark.slow
def test_it_is_that_of_processes_with_and_without_compiled_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    write_random(tmp_path / "model", PRESETS["tiny"], progress=False)
    monkeypatch.setattr(first_token, "WARM_STARTS", 1)
    figures = start_figures(tmp_path / "model", prompt=4, kv_format="bfloat16")
    assert set(figures) == {
        f"{name}_seconds_{cache}" for name in ("first_token", "second_chunk") for cache in ("cold", "warm")
    } | {"first_token_prompt", "resident_bytes"}
    assert min(figures.values()) > 0
    assert figures["resident_bytes"] > (tmp_path / "model" / storage.MODEL).stat().st_size


@pytest.mark.extended
def test_a_second_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    write_random(tmp_path / "model", PRESETS["tiny"], progress=False)
    programs = []
    for _ in range(2):
        first_token._start(tmp_path / "model", 4, "bfloat16", str(tmp_path / "cache"))
        programs.append(sorted(path.name for path in (tmp_path / "cache").rglob("*-cache")))
    assert programs[0] == programs[1]
    assert {name.split("-")[0] for name in programs[0]} >= {"jit_prefill", "jit_advance"}


def test_a_start_that_fails_is_an_error_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the start of .*absent failed: .*absent"):
        start_figures(tmp_path / "absent", prompt=4, kv_format="bfloat16")
