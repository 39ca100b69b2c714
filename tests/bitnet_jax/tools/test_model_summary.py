"""A model on one screen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.data import ByteTokenizer
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.inference.cache import kv_bytes
from bitnet_jax.model_folders import LoadedModel, save_model
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.packed import packing
from bitnet_jax.tools import model_bench, model_summary

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=128, max_length=32,
    mlp="silu_glu", norm_placement="pre", precision=(("layers_0/*", "float32"), ("*", "bitnet_b158")),
)  # fmt: skip
FLOAT = dataclasses.replace(CONFIG, precision="float32", attention_bias="qkv", tie_embeddings=False)
TEMPLATE = "{% for message in messages %}" + "{{ message.content }}\n" * 20 + "{% endfor %}"


def model(config: ModelConfig, tokenizer: Any = None) -> LoadedModel[ModelConfig]:
    conversation = Conversation(end=(1, 2), template=TEMPLATE)
    return LoadedModel(
        "run", config, init_variables(config, jax.random.key(0)), tokenizer, None, conversation
    )


def test_the_bytes_of_a_decode_step_add_up() -> None:
    packed = packing.pack(model(CONFIG).variables["params"], CONFIG)
    parts = model_summary.decode_bytes(CONFIG, packed)
    blocks = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 128  # weights of a block
    assert parts["weights"] == 4 * blocks + 2 * blocks // 4
    assert parts["scales"] == 2 * 7 * 4
    assert parts["head"] == 256 * 64 * 4  # the embedding is the head
    assert parts["other"] == (3 * 2 + 1) * 64 * 4
    total = model_bench._bytes_per_token(CONFIG, packed, 5, None)
    assert sum(parts.values()) == packing.sizes(packed).total == total - kv_bytes(CONFIG, 5)
    untied = model_summary.decode_bytes(FLOAT, model(FLOAT).variables)
    assert (
        untied["other"] == ((3 * 2 + 1) * 64 + 3 * (64 + 2 * 32) + 64) * 4
    )  # norms, biases, a row of the embedding


def test_layers_are_grouped_by_shape_and_precision() -> None:
    packed = packing.pack(model(CONFIG).variables["params"], CONFIG)
    groups = model_summary.layer_groups(CONFIG, packed)
    assert sum(group["count"] for group in groups) == 21
    found = {(group["layers"], group["recipe"]): group["count"] for group in groups}
    assert found["attention/q_proj", "float32"] == 1
    assert found["attention/q_proj", "bitnet_b158"] == 2
    assert len(groups) == 14


@pytest.mark.parametrize("to", ["packed", "huggingface", "gguf"])
def test_every_format_fits_one_screen(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(FLOAT, num_layers=9)
    save_model(tmp_path / "m", model(config, ByteTokenizer() if to == "packed" else None), to)
    assert cli.main(["info", f"{tmp_path}/m", "--json", f"{tmp_path}/i.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    out, figures = "\n".join(lines), json.loads((tmp_path / "i.json").read_text())
    assert (
        "decoder, 9 layers of width 64, 4 heads of 16 (2 of keys), silu_glu of 128, 256 tokens; untied head"
        in out
    )
    assert "biases of q_proj, k_proj, v_proj" in out
    assert "32 positions, trained length not stated" in out
    assert "end tokens: 1, 2" in out or to != "packed"  # the others state them with a tokenizer
    decode = figures["decode"]
    assert decode["kv_bytes_per_position"] == 9 * 2 * 2 * 16 * 4
    assert f"bytes per token: {decode['bytes_per_token']['total']:,d} (weights " in out
    speed, ceiling = decode["expected_tokens_per_second"], decode["read_ceiling_gbytes_per_second"]
    if ceiling is None:
        assert "expected speed: not known" in out
    else:
        assert speed == pytest.approx(1e9 * ceiling / decode["bytes_per_token"]["total"])
        assert "as memory allows" in out


def test_templates_are_shown_by_their_first_words() -> None:
    assert model_summary.describe_template(None) == "no"
    assert model_summary.describe_template("a\n b") == "yes, 4 characters: a b"
    long = model_summary.describe_template(TEMPLATE)
    assert long.startswith(f"yes, {len(TEMPLATE)} characters: {{% for message in messages %}}")
    assert long.endswith("...")


@pytest.mark.slow
def test_bench_times_a_packed_copy_of_other_formats(tmp_path: Path) -> None:
    save_model(tmp_path / "m.gguf", model(FLOAT), "gguf")
    with model_bench.model_folder(None, f"{tmp_path}/m.gguf") as folder:
        assert folder != tmp_path / "m.gguf"
        figures = model_bench.bench_model(folder, prompt=4, new_tokens=4, repeats=1)
        assert figures["head_format"] == "float32"
    assert not folder.exists()
    with (
        pytest.raises(ValueError, match="expected only one of them"),
        model_bench.model_folder(FLOAT, tmp_path / "m.gguf"),
    ):
        pass
