"""Metadata of GGUF files: what each key means, and what is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.interop.gguf_config import FAMILIES, INERT, NEUTRAL, family_of, metadata_of, read_config
from bitnet_jax.interop.gguf_file import GgufFile, Tensor, Value
from bitnet_jax.interop.gguf_types import named_type
from bitnet_jax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=48, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=96, max_length=40,
    rope_theta=12345.0, norm_eps=1e-5, mlp="silu_glu", norm_placement="pre", precision="float32",
)  # fmt: skip


def file(metadata: dict[str, Value | None], head: bool = False) -> GgufFile:
    """Tensors as in a file of CONFIG, as far as read_config looks at them."""
    tensor = Tensor(named_type("F32"), (48, 64), np.zeros(48 * 64 * 4, np.uint8))
    names = ["token_embd.weight", *(f"blk.{i}" for i in range(9)), *(["output.weight"] if head else [])]
    return GgufFile(Path("m.gguf"), {k: v for k, v in metadata.items() if v}, dict.fromkeys(names, tensor))


def entries(architecture: str = "llama", **changes: Value | None) -> dict[str, Value | None]:
    metadata = {"general.architecture": Value("string", architecture), **metadata_of(CONFIG, architecture)}
    return metadata | {f"{architecture}.{key}": value for key, value in changes.items()}


def test_a_config_returns() -> None:
    assert read_config(file(entries()), "float32")[0] == CONFIG
    assert read_config(file(entries(), head=True), "float32")[0] == dataclasses.replace(
        CONFIG, tie_embeddings=False
    )
    assert read_config(file(entries()), "bfloat16")[0].dtype == "bfloat16"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_each_architecture_has_its_activation_and_norms(name: str) -> None:
    config, family = read_config(file(entries(name), head=True), "float32")
    assert config.mlp == ("relu2_glu" if name in ("bitnet-b1.58", "bitnet-25") else "silu_glu")
    assert config.norm_placement == ("sub" if name.startswith("bitnet") else "pre")
    assert config.tie_embeddings == name.startswith("bitnet")
    assert family.paired_rows == (name == "llama")
    if name not in ("bitnet-25", "qwen2", "qwen3"):
        assert family_of(config) == name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "llama"),
        ({"attention_bias": "qkv"}, "qwen2"),
        ({"attention_bias": "qkvo"}, "llama"),
        ({"attention_bias": "qkv", "mlp_bias": True}, "llama"),
        ({"use_bias": True}, "llama"),
        ({"qk_norm": True}, "qwen3"),
    ],
)
def test_biases_and_norms_of_q_and_k_decide_the_architecture(changes: dict[str, Any], name: str) -> None:
    assert family_of(dataclasses.replace(CONFIG, **changes)) == name


def test_absent_keys_have_llama_cpps_defaults() -> None:
    absent = {
        "rope.freq_base",
        "attention.head_count_kv",
        "rope.dimension_count",
        "vocab_size",
        "attention.key_length",
    }
    metadata = {key: v for key, v in entries().items() if key.removeprefix("llama.") not in absent}
    metadata |= {"llama.attention.value_length": None}
    config, _ = read_config(file(metadata), "float32")
    assert (config.rope_theta, config.kv_heads, config.head_size, config.vocab_size) == (10_000.0, 4, 16, 48)


def test_neutral_and_inert_keys_are_passed_over() -> None:
    kinds = {str: "string", float: "f32", bool: "bool", int: "u32"}
    neutral = {key: Value(kinds[type(value)], value) for key, value in NEUTRAL.items()}
    inert = {key: Value("u32", 7) for key in INERT}
    other = {
        "tokenizer.ggml.pre": Value("string", "x"),
        "split.count": Value("u16", 1),
        "quantize.imatrix.file": Value("string", "x"),
    }
    assert read_config(file(entries(**neutral, **inert) | other), "float32")[0] == CONFIG


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.type", Value("string", "yarn"), "is 'yarn', expected 'none'"),
        ("rope.scaling.factor", Value("f32", 8.0), "is 8.0, expected 1.0"),
        ("attention.sliding_window", Value("u32", 512), "is 512, expected 0"),
        ("attention.scale", Value("f32", 0.5), "is 0.5, expected 0.0"),
        ("attn_logit_softcapping", Value("f32", 50.0), "is 50.0, expected 0.0"),
        ("final_logit_softcapping", Value("f32", 30.0), "is 30.0, expected 0.0"),
        ("expert_count", Value("u32", 8), "is 8, expected 0"),
        ("attention.causal", Value("bool", False), "is False, expected True"),
        ("ssm.state_size", Value("u32", 1), "may change the computation"),
        ("rope.scaling.attn_factor", Value("f32", 1.0), "may change the computation"),
        ("attention.value_length", Value("u32", 16), "is 16, expected 32"),
        ("rope.dimension_count", Value("u32", 16), "is 16, expected 32"),
        ("vocab_size", Value("u32", 50), "is 50, expected 48"),
        ("attention.head_count_kv", Value("u32[]", np.array([2, 2])), "expected an integer"),
        ("feed_forward_length", Value("f32", 96.0), "expected an integer"),
        ("feed_forward_length", None, "is None, expected an integer"),
        ("block_count", Value("u32", 0), "is 0, expected 1 to"),
        ("block_count", Value("u32", 2**31 - 1), "holds only 10 tensors"),
        ("context_length", Value("u64", 2**40), "expected 1 to"),
        ("attention.layer_norm_rms_epsilon", None, "is None, expected a number"),
        (
            "attention.layer_norm_rms_epsilon",
            Value("f32", float("nan")),
            "is nan, expected a positive number",
        ),
        ("rope.freq_base", Value("f32", -1.0), "is -1.0, expected a positive number"),
    ],
)
def test_what_is_refused(key: str, value: Value | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"llama.{key} .*{message}"):
        read_config(file(entries(**{key: value})), "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": Value("string", "gemma3")}, "is 'gemma3', expected one of bitnet-b1.58, "),
        ({"general.architecture": None}, "is None, expected a string"),
        ({"split.count": Value("u16", 3)}, "split.count is 3.*llama-gguf-split --merge"),
        ({"prism.hadamard.block": Value("u32", 1024)}, "prism.hadamard.block is '1024'; this key may change"),
    ],
)
def test_what_is_refused_outside_the_architecture(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(file(entries() | changes), "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_bits": 8}, "model.kv_bits is 8, which GGUF files cannot hold; expected None"),
        (
            {"use_bias": True, "qk_norm": True},
            r"got model.qk_norm=True with biases of q_proj\+.*down_proj, which none of the architectures qwen2, llama",
        ),
        (
            {"attention_bias": "qkv", "norm_placement": "sub"},
            "got model.qk_norm=False with biases of q_proj.k_proj.v_proj, which none of the architectures bitnet has",
        ),
        ({"position": "learned"}, "model.position is 'learned'"),
        ({"attention": "relu"}, "model.attention is 'relu'"),
        ({"attention_scale": 0.5}, "model.attention_scale is 0.5"),
        (
            {"mlp": "gelu"},
            "model.mlp='gelu', expected one of pre with silu_glu, sub with relu2_glu, sub with silu_glu",
        ),
        ({"norm_placement": "sub", "tie_embeddings": False}, "the architecture bitnet has a tied head"),
        ({"head": "int8", "precision": "bitnet_b158"}, "model.head is 'int8'"),
    ],
)
def test_configs_that_have_no_architecture(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family_of(dataclasses.replace(CONFIG, **changes))
