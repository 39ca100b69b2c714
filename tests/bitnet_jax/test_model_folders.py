"""One function opens every kind of model folder. (Runs, packed folders and refusals: test_cli.py.)"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.model_folders import load_model, matrices
from bitnet_jax.models import Transformer


def test_a_hugging_face_folder_is_recognised_and_keeps_its_packed_weights(oracles: Path) -> None:
    folder = oracles / "hf_bitnet" / "bitnet_autobit_packed_bf16_tied"
    model = load_model(folder)
    assert model.kind == "hugging face"
    assert (model.tokenizer is not None) == (folder / "tokenizer.json").exists()
    rows = matrices(model.config, model.variables)
    assert {row["stored"] for row in rows.values()} == {"ternary2 panel16"}
    assert all(row["recipe"].startswith("bitnet_b158") for row in rows.values())
    logits = Transformer(model.config).apply(model.variables, jnp.zeros((1, 3), jnp.int32)).logits
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_not_taken_for_hugging_face(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="expected checkpoints/"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors|config\.json"):
        load_model(tmp_path)


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"gpt2|safetensors"):
        load_model(tmp_path)
