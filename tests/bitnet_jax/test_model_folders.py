"""One function opens every kind of model folder. (Runs, packed folders and refusals: test_cli.py.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.model_folders import load_model, matrices
from bitnet_jax.models import PRESETS, Transformer
from bitnet_jax.tools.random_model import write_random


def test_a_hugging_face_folder_is_recognized_and_keeps_its_packed_weights(oracles: Path) -> None:
    folder = oracles / "hf_bitnet" / "bitnet_autobit_packed_bf16_tied"
    model = load_model(folder)
    assert model.kind == "huggingface"
    assert (model.tokenizer is not None) == (folder / "tokenizer.json").exists()
    rows = matrices(model.config, model.variables)
    assert {row["stored"] for row in rows.values()} == {"ternary2 panel16"}
    assert all(row["recipe"].startswith("bitnet_b158") for row in rows.values())
    logits = Transformer(model.config).apply(model.variables, jnp.zeros((1, 3), jnp.int32)).logits
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_not_mistaken_for_hugging_face(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="expected checkpoints/"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors|config\.json"):
        load_model(tmp_path)


def test_the_error_names_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"gpt2|safetensors"):
        load_model(tmp_path)


def test_opening_a_packed_model_does_not_import_training_dependencies(
    tmp_path: Path, repository: Path
) -> None:
    write_random(tmp_path / "model", PRESETS["tiny"], progress=False)
    code = f"""
import sys
from bitnet_jax.model_folders import load_model
assert load_model({str(tmp_path / "model")!r}).kind == "packed"
print(sorted({{"optax", "orbax", "ml_collections"}} & set(sys.modules)))
"""
    roots = os.pathsep.join([str(repository), str(repository / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": roots}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
