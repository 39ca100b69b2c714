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
from bitnet_jax.interop.huggingface_families import INERT
from bitnet_jax.models import ModelConfig

PACKED = "bitnet_autobit_packed_fp32_untied"
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 4}
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


def test_defaults_of_the_other_families() -> None:
    qwen2 = config_of(model_type="qwen2")
    assert (qwen2.biased, qwen2.qk_norm, qwen2.sliding_window) == (
        ("q_proj", "k_proj", "v_proj"),
        False,
        None,
    )
    qwen3 = config_of(model_type="qwen3")
    assert (qwen3.biased, qwen3.qk_norm, qwen3.head_size) == ((), True, 128)
    mistral = config_of(model_type="mistral")
    assert (mistral.sliding_window, mistral.kv_heads, mistral.ffn_size) == (4096, 8, 14_336)
    smollm3 = config_of(model_type="smollm3")
    assert smollm3.no_rope_layers == tuple(range(3, 36, 4))
    assert (smollm3.rope_theta, smollm3.tie_embeddings) == (2e6, True)


def test_keys_without_effect_and_features_switched_off_are_accepted() -> None:
    plain = config_of(model_type="llama")
    inert = dict.fromkeys(INERT, 7)
    off = {
        "use_mup": False,
        "logits_soft_cap": None,
        "pruned_heads": {},
        "extra": [],
        "partial_rotary_factor": 1.0,
    }
    assert config_of(model_type="llama", **inert, **off) == plain
    published = {"use_sliding_window": False, "sliding_window": 131_072, "max_window_layers": 28}
    assert config_of(model_type="qwen2", use_mrope=False, **published) == config_of(model_type="qwen2")


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
        ({"model_type": "gemma"}, "model_type: got 'gemma', expected one of bitnet, llama, qwen2"),
        ({"model_type": ["bitnet"]}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected one of relu2, silu"),
        ({"hidden_act": {}}, "hidden_act"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"mlp_bias": True}, "mlp_bias is 'True', which model_type 'bitnet' does not have here"),
        ({"model_type": "llama", "mlp_bias": 1}, "mlp_bias is 1, expected true or false"),
        (
            {"model_type": "llama", "sliding_window": 64},
            "sliding_window is '64', which model_type 'llama' does not",
        ),
        (
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping is '30.0', which .* may change the outputs",
        ),
        ({"embedding_multiplier": 12}, "embedding_multiplier is '12'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is '0.5'"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is 'True'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "layer_types"),
        (
            QWEN2 | {"use_sliding_window": True, "max_window_layers": 2},
            "only models with a sliding window in every",
        ),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers is '2'"),
        (QWEN2 | {"use_sliding_window": 1}, "use_sliding_window is 1, expected true or false"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 4}, "layer_types is .* without a sliding window"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": 5}, "layer_types is 5"),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8},
            "only models with a sliding",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "one per layer"),
        ({"model_type": "smollm3", "no_rope_layers": [2] * 36}, "one per layer"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
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
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic', expected one of default",
        ),
        ({"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "rope_type is"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor: got 0.5, expected a number of at least 1",
        ),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor: got True"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}},
            "beta_fast is 3, which is not supported",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "expected low < high",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 8, "mscale": "x", "mscale_all_dim": 1}},
            "mscale is 'x'",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 0}},
            "original_length: got 0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 5e5}},
            "the scaling is given more than once",
        ),
        ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 8}}, "rope_theta above 1"),
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
    with pytest.raises(ValueError, match="no latent weights .* scales below the smallest"):
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
    if data.draw(st.booleans()):
        scaling = {"type": "yarn", "factor": 2.0, "beta_fast": 8, "original_max_position_embeddings": 64}
        content |= {"rope_scaling": scaling}
        content |= {
            "model_type": "smollm3",
            "hidden_act": "silu",
            "layer_types": None,
            "no_rope_layers": None,
        }
    content |= {"head_dim": 16, "sliding_window": None}
    target = data.draw(
        st.sampled_from([v for v in content.values() if isinstance(v, dict) and v] + [content])
    )
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
