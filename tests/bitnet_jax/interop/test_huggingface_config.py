"""config.json: the meaning of each key, defaults of absent keys, and rejected values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bitnet_jax.interop.huggingface import load
from bitnet_jax.interop.huggingface_config import read_config
from bitnet_jax.models import ModelConfig

PACKED = "bitnet_autobit_packed_fp32_untied"
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


def config_of(**content: Any) -> ModelConfig:
    return read_config(content, tensor_count=1000, dtype="float32")[0]


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    bitnet = config_of(model_type="bitnet")
    assert (bitnet.hidden_size, bitnet.ffn_size, bitnet.num_layers, bitnet.vocab_size) == (
        2560,
        6912,
        30,
        128_256,
    )
    assert (bitnet.num_heads, bitnet.kv_heads, bitnet.head_size) == (20, 5, 128)
    # The published model's file has 4096 and true.
    assert (bitnet.max_length, bitnet.tie_embeddings) == (2048, False)
    assert (bitnet.rope_theta, bitnet.norm_eps) == (500_000.0, 1e-5)
    assert (bitnet.mlp, bitnet.norm_placement, bitnet.precision) == ("relu2_glu", "sub", "float32")

    llama = config_of(model_type="llama")
    assert (llama.mlp, llama.norm_placement, llama.kv_heads) == ("silu_glu", "pre", 32)
    assert (llama.rope_theta, llama.norm_eps) == (10_000.0, 1e-6)


def test_null_kv_heads_means_the_number_of_heads() -> None:
    assert config_of(num_key_value_heads=None).kv_heads == 20


def test_head_dim_is_honoured() -> None:
    assert config_of(head_dim=64).linear_shapes()["layers_0/attention/k_proj"] == (5 * 64, 2560)


@pytest.mark.parametrize(
    "content",
    [
        {"rope_theta": 12345.0},
        {"rope_theta": 12345, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
        {"rope_parameters": {"rope_theta": 12345.0}, "rope_theta": 12345.0},
    ],
)
def test_both_spellings_of_rope_theta(content: dict[str, Any]) -> None:
    assert config_of(**content).rope_theta == 12345.0


def test_a_quantization_config_with_only_the_method_means_offline_bitlinear() -> None:
    _, form = read_config({"quantization_config": {"quant_method": "bitnet"}}, 1000, "float32")
    assert (form.quantized, form.offline, form.scale_multiplies) == (True, True, False)
    assert (form.inside_norm, form.inside_norm_eps) == (False, 1e-6)


@pytest.mark.parametrize(
    ("entry", "floats"),
    [
        ("model.layers.1.mlp.up_proj", ["layers_1/mlp/up_proj"]),
        ("layers.0.self_attn.o_proj", ["layers_0/attention/o_proj"]),
        ("down_proj", ["layers_0/mlp/down_proj", "layers_1/mlp/down_proj"]),
        ("lm_head", []),
        ("model.layers.0.", [f"layers_0/attention/{name}_proj" for name in "qkvo"] + ["layers_0/mlp/*"]),
    ],
)
def test_modules_that_are_not_converted_stay_float(entry: str, floats: list[str]) -> None:
    config = config_of(num_hidden_layers=2, quantization_config=ONLINE | {"modules_to_not_convert": [entry]})
    names = ("gate_proj", "up_proj", "down_proj")
    expected = {p.replace("*", name) for p in floats for name in names}
    precisions = config.precisions()
    assert {path for path, p in precisions.items() if not p.quantizes_weights} == expected | {"lm_head"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "mistral"}, "model_type: got 'mistral', expected one of bitnet, llama"),
        ({"model_type": ["bitnet"]}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected one of relu2, silu"),
        ({"hidden_act": {}}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias is True; projections with a bias"),
        ({"mlp_bias": 1}, "mlp_bias"),
        ({"num_hidden_layers": 10**12}, "expected a positive integer"),
        ({"num_hidden_layers": 1001}, "the folder holds only 1000 tensors"),
        ({"hidden_size": "2560"}, "hidden_size is '2560', expected a positive integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"num_attention_heads": 7}, "not a multiple"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'expected rope_type "default"'),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "not supported"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "not supported"),
        ({"rope_parameters": 5e5}, "expected an object or null"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "given more than once"),
        ({"quantization_config": []}, "expected an object or null"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq', expected bitnet"),
        ({"quantization_config": ONLINE | {"linear_class": "bitlinear"}}, "no online mode"),
        ({"quantization_config": ONLINE | {"linear_class": None}}, "expected bitlinear or autobitlinear"),
        ({"quantization_config": ONLINE | {"bits": 2}}, "quantization_config.bits is unknown"),
        ({"quantization_config": ONLINE | {"use_rms_norm": 1}}, "use_rms_norm is 1"),
        ({"quantization_config": ONLINE | {"modules_to_not_convert": "lm_head"}}, "expected a list of names"),
        ({"quantization_config": ONLINE | {"modules_to_not_convert": ["mlp"]}}, "write full module names"),
        (
            {"quantization_config": ONLINE | {"modules_to_not_convert": [".*up_proj"]}},
            "write full module names",
        ),
        (
            {"quantization_config": ONLINE | {"use_rms_norm": True, "modules_to_not_convert": ["up_proj"]}},
            "use_rms_norm with modules_to_not_convert",
        ),
    ],
)
def test_unsupported_configs_are_rejected(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**content)


@pytest.fixture
def model(oracles: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(oracles / "hf_bitnet" / PACKED, folder, ignore=shutil.ignore_patterns("oracle.npz"))
    return folder


def rewrite(folder: Path, change: dict[str, np.ndarray | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP: None}, rf"1 missing \(first {UP}\), 0 unexpected"),
        ({f"{UP}_scale": None}, rf"1 missing \(first {UP}_scale\)"),
        ({"model.layers.0.mlp.up_proj.bias": np.ones(96, np.float32)}, "1 unexpected"),
        ({UP: np.full((24, 64), 0b11, np.uint8)}, f"{UP}: .*code 3, expected 0, 1 or 2"),
        ({UP: np.ones((96, 64), np.uint8)}, r"got uint8\[96, 64\], expected uint8 \[96/4, 64\] or floats"),
        ({UP: np.ones((24, 63), np.uint8)}, r"got uint8\[24, 63\], expected"),
        ({UP: np.ones((24, 64), np.float32)}, r"got float32\[24, 64\], expected"),
        ({UP: np.full((96, 64), 0.5, np.float32)}, 'latent weights need quantization_mode "online"'),
        ({f"{UP}_scale": np.zeros(1, np.float32)}, "weight_scale is 0.0, expected a positive number"),
        ({f"{UP}_scale": np.full(1, np.nan, np.float32)}, "got NaN"),
        ({f"{UP}_scale": np.ones(2, np.float32)}, r"shape \[2\], expected one value"),
        ({"model.norm.weight": np.ones(65, np.float32)}, r"got float32\[65\], expected floats \[64\]"),
        ({"model.norm.weight": np.ones(64, np.uint8)}, r"got uint8\[64\], expected floats \[64\]"),
    ],
)
def test_mismatched_tensors_are_rejected(model: Path, change: dict[str, Any], message: str) -> None:
    rewrite(model, change)
    with pytest.raises(ValueError, match=message):
        load(model)


def test_a_scale_that_is_too_small_cannot_become_latent(model: Path) -> None:
    rewrite(model, {f"{UP}_scale": np.full(1, 1e-6, np.float32)})
    with pytest.raises(ValueError, match="load with packed=True"):
        load(model, packed=False)
    weight = load(model)[1]["packed"]["layers_0"]["mlp"]["up_proj"]["weight"]
    assert weight.scale == np.float32(1e-6)


def test_constants_and_a_second_copy_of_the_tied_head_are_accepted(oracles: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(oracles / "hf_bitnet" / "bitnet_plain_fp32_tied", folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    inverse = np.ones(8, np.float32)
    rewrite(folder, {"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": inverse})
    assert "lm_head" not in load(folder)[1]["params"]
    rewrite(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        load(folder)


def test_the_error_names_a_missing_file(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load(model)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_fuzzed_config_loads_or_raises_value_error(oracles: Path, data: st.DataObject) -> None:
    content = json.loads((oracles / "hf_bitnet" / PACKED / "config.json").read_text())
    content |= {"head_dim": 16, "rope_scaling": None}
    target = content if data.draw(st.booleans()) else content["quantization_config"]
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON_VALUES)
    try:
        config, _ = read_config(content, tensor_count=50, dtype="float32")
    except ValueError as error:
        message = str(error)
    else:
        message = "loads"
        assert config.num_layers <= 50
    assert message
    assert "\n" not in message
