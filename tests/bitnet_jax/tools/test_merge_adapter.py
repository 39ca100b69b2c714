"""Merging an adapter: exact in floats, measured and refused in quantized layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.cli.main import main
from bitnet_jax.data.tokenizers import ByteTokenizer
from bitnet_jax.model_folders import load_text_model
from bitnet_jax.models import ModelConfig, Transformer, init_variables
from bitnet_jax.packed import packing, storage
from bitnet_jax.packed.adapters import Adapter, fingerprint, save_adapter, with_adapters
from bitnet_jax.tools.merge_adapter import merge, summary

TOKENS = jax.random.randint(jax.random.key(3), (2, 12), 0, 256)


def made(folder: Path, recipe: str, size: float) -> tuple[Any, Adapter]:
    """A packed model and an adapter whose changes are `size` times its weights."""
    config = ModelConfig(
        vocab_size=257,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        ffn_size=64,
        max_length=160,
        precision=recipe,
    )
    latent = init_variables(config, jax.random.key(0))
    storage.save_packed(folder / "model", packing.pack(latent["params"], config), config, ByteTokenizer())
    rng, layers = np.random.default_rng(0), {}
    for path in ("layers_0/attention/q_proj", "layers_0/mlp/down_proj"):
        n, k = config.linear_shapes()[path]
        a, b = (rng.normal(size=shape).astype(jnp.bfloat16) for shape in ((1, k), (n, 1)))
        layers[path] = (a, b)
    adapter = Adapter(
        layers, 0.02 * size, fingerprint(folder / "model")
    )  # 0.02: the deviation of the weights
    save_adapter(folder / "adapter.safetensors", adapter)
    return load_text_model(folder / "model"), adapter


def logits(config: ModelConfig, variables: Any) -> np.ndarray:
    return np.asarray(jax.jit(Transformer(config).apply)(variables, TOKENS).logits)


def test_in_floats_the_merged_model_is_the_model_with_its_adapter(tmp_path: Path) -> None:
    model, adapter = made(tmp_path, "float32", 0.5)
    merged, survived = merge(model, adapter)
    beside = logits(model.config, with_adapters(model.variables, [(adapter, 1.0)]))
    np.testing.assert_allclose(logits(model.config, merged.variables), beside, rtol=1e-3, atol=1e-4)
    assert np.max(np.abs(beside - logits(model.config, model.variables))) > 0.01
    assert survived == summary(survived) == {}


@pytest.mark.parametrize(("size", "least", "most"), [(1e-3, 0.9, 1.1), (1.0, 0.1, 0.9)])
def test_what_survives_in_codes(tmp_path: Path, size: float, least: float, most: float) -> None:
    """A change of a thousandth of the weights is lost in codes of 1.58 bits, one as large as they are only partly."""
    model, adapter = made(tmp_path, "bitnet_b158", size)
    merged, survived = merge(model, adapter)
    told = summary(survived)
    assert told["layers"] == 2
    assert told["codes"] == 32 * 32 + 32 * 64
    assert (told["changed"] == 0) == (size < 0.01)
    assert least < told["lost"] < most
    again = packing.pack(merged.variables["params"], model.config)["packed"]
    for path, one in survived.items():  # the codes that would be written
        keys = path.split("/")
        old, new = (
            np.asarray(tree[keys[0]][keys[1]][keys[2]]["weight"].codes)
            for tree in (model.variables["packed"], again)
        )
        assert np.any(old != new) == (one.changed > 0)


def test_the_command_refuses_quantized_layers_unless_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "bitnet_b158", 1e-3)
    given = [
        "merge",
        str(tmp_path / "model"),
        str(tmp_path / "adapter.safetensors"),
        str(tmp_path / "merged"),
    ]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "0 of 3,072 codes change (0.00%)" in error
    assert "Keep the adapter beside the model" in error
    assert not (tmp_path / "merged").exists()
    assert main([*given, "--requantize", "--json", str(tmp_path / "merge.json")]) == 0
    figures = json.loads((tmp_path / "merge.json").read_text())
    assert figures["changed"] == 0
    assert figures["kl"] > 0
    assert main(["generate", str(tmp_path / "merged"), "--prompt", "x", "--tokens", "2"]) == 0


def test_the_command_merges_floats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "float32", 0.5)
    files = [str(tmp_path / name) for name in ("model", "adapter.safetensors:0.5", "merged")]
    assert main(["merge", *files, "--json", str(tmp_path / "merge.json")]) == 0
    assert json.loads((tmp_path / "merge.json").read_text())["kl"] < 1e-8
    assert "KL(model with adapter || merged)" in capsys.readouterr().out
