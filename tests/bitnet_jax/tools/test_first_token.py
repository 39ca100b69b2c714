"""The time to the first token: of processes that start, and an error of one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_jax.models import PRESETS
from bitnet_jax.tools.first_token import first_token_seconds
from bitnet_jax.tools.random_model import write_random


@pytest.mark.extended
def test_a_second_start_finds_its_programs_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    write_random(tmp_path / "model", PRESETS["tiny"], progress=False)
    figures = first_token_seconds(tmp_path / "model", prompt=4, kv_format="bfloat16")
    assert set(figures) == {
        f"{name}_seconds_{cache}" for name in ("first_token", "second_chunk") for cache in ("cold", "warm")
    }
    assert min(figures.values()) > 0
    cold, warm = (
        figures[f"first_token_seconds_{cache}"] + figures[f"second_chunk_seconds_{cache}"]
        for cache in ("cold", "warm")
    )
    assert warm < cold  # by the time to compile two programs


def test_a_start_that_fails_is_an_error_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the start of .*absent failed: .*absent"):
        first_token_seconds(tmp_path / "absent", prompt=4, kv_format="bfloat16")
