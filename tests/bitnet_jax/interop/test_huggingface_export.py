"""Export to Hugging Face format: the bytes of published forms, and models read back equal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from bitnet_jax.data.tokenizers import ByteTokenizer, from_json
from bitnet_jax.interop.huggingface import load
from bitnet_jax.interop.huggingface_export import save
from bitnet_jax.interop.safetensors_folder import open_tensors
from bitnet_jax.models import ModelConfig, VisionTransformerConfig, init_variables
from bitnet_jax.packed.packing import pack
from bitnet_jax.packed.tensor_file import StorageError
from bitnet_kernels import PackedArray, unpack

pytestmark = pytest.mark.extended

MASTER = "bitnet_online_bf16_tied"
SAME_MODEL = {
    "online": MASTER,
    "packed": "bitnet_autobit_packed_bf16_tied",
    "unpacked": "bitnet_autobit_unpacked_bf16_tied",
    "bitlinear": "bitnet_bitlinear_packed_bf16_tied",
}
FORM_OF = {
    "bitnet_autobit_packed_bf16_tied": "packed",
    "bitnet_autobit_packed_fp32_untied": "packed",
    "bitnet_autobit_unpacked_bf16_tied": "unpacked",
    "bitnet_bitlinear_packed_bf16_tied": "bitlinear",
    "bitnet_bitlinear_packed_fp32_untied": "bitlinear",
    "bitnet_online_bf16_gqa20x5": "online",
    "bitnet_online_bf16_tied": "online",
    "bitnet_online_fp32_untied": "online",
    "bitnet_plain_bf16_untied": "plain",
    "bitnet_plain_fp32_tied": "plain",
    "llama_bitlinear_packed_bf16_untied": "bitlinear",
    "llama_bitlinear_rmsnorm_bf16_untied": "bitlinear",
    "llama_online_bf16_untied": "online",
    "llama_plain_fp32_untied": "plain",
}
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64,
    "max_length": 32,
}  # fmt: skip


def random_model(**fields: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """Every parameter is a normal number, the gains too: initial ones would hide exchanged tensors."""
    config = ModelConfig(**(SMALL | fields))
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    generator = np.random.default_rng(0)
    return config, jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(0, 0.02, leaf.shape), leaf.dtype), shapes
    )


def assert_equal_variables(got: Any, expected: Any) -> None:
    got, expected = flatten_dict(got, sep="/"), flatten_dict(expected, sep="/")
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        other = got[path]
        if isinstance(value, PackedArray):
            np.testing.assert_array_equal(unpack(other), unpack(value), err_msg=path)
            value, other = value.scale, other.scale
        assert other.dtype == value.dtype, path
        np.testing.assert_array_equal(other, value, err_msg=path)


@pytest.mark.parametrize(("form", "name"), SAME_MODEL.items())
def test_the_master_model_gives_the_bytes_of_each_form(
    oracles: Path, tmp_path: Path, form: str, name: str
) -> None:
    config, variables = load(oracles / "hf_bitnet" / MASTER)
    save(tmp_path / "model", config, variables, form=form, dtype="bfloat16")
    got, expected = open_tensors(tmp_path / "model"), open_tensors(oracles / "hf_bitnet" / name)
    assert got.keys() == expected.keys()
    for tensor, value in expected.items():
        assert got[tensor].dtype == value.dtype, tensor
        if tensor.endswith("weight_scale"):
            assert got[tensor].shape == (1,)
            bits = [int(x.view(np.uint16)[0]) for x in (got[tensor], value)]
            assert abs(bits[0] - bits[1]) <= 1, tensor  # float32 means of another summation order
        else:
            np.testing.assert_array_equal(got[tensor], value, err_msg=tensor)


@pytest.mark.parametrize(("name", "form"), FORM_OF.items())
def test_a_published_form_is_written_as_it_was_read(
    oracles: Path, tmp_path: Path, name: str, form: str
) -> None:
    source = oracles / "hf_bitnet" / name
    config, variables = load(source)
    save(tmp_path / "model", config, variables, form=form)
    again, read = load(tmp_path / "model")
    assert again == config
    assert_equal_variables(read, variables)
    got, expected = open_tensors(tmp_path / "model"), open_tensors(source)
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    for tensor, value in expected.items():  # as values: the library writes some ternary zeros as -0.0
        np.testing.assert_array_equal(got[tensor], value, err_msg=tensor)
    kept = json.loads((source / "config.json").read_text())
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["torch_dtype"] == kept.get("torch_dtype", kept.get("dtype"))
    assert (content["model_type"], content["architectures"]) == (kept["model_type"], kept["architectures"])


@pytest.mark.parametrize("form", ["packed", "unpacked", "bitlinear"])
@pytest.mark.parametrize("ternary_format", ["ternary2", "ternary5"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_trained_model_reads_back_packed(
    tmp_path: Path, form: str, ternary_format: str, packed: bool
) -> None:
    config, variables = random_model(ternary_format=ternary_format)
    expected = pack(variables["params"], config)
    save(tmp_path / "model", config, expected if packed else variables, form=form)
    again, read = load(tmp_path / "model")
    assert dataclasses.replace(again, ternary_format=ternary_format) == config
    assert flatten_dict(read["packed"]).keys() == flatten_dict(expected["packed"]).keys()
    for path, weight in flatten_dict(expected["packed"], sep="/").items():
        stored = read["packed"]
        for key in path.split("/"):
            stored = stored[key]
        np.testing.assert_array_equal(unpack(stored), unpack(weight))
        # Exact for "packed" models, but for reciprocals that no float32 has; a mean of another summation order else.
        np.testing.assert_allclose(stored.scale, weight.scale, rtol=2.0**-22)
    assert_equal_variables(read["params"], expected["params"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_placement": "pre", "mlp": "silu_glu", "tie_embeddings": False},
        {"norm_placement": "pre", "head_dim": 16},
        {"inside_norm": True, "inside_norm_eps": 1e-4},
        {"embedding_dtype": "bfloat16", "num_kv_heads": None, "norm_eps": 1e-6, "rope_theta": 5e5},
        {"precision": (("layers_0/attention/k_proj", "float32"), ("*", "bitnet_b158"))},
    ],
)
def test_latent_weights_read_back_bit_for_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    config, variables = random_model(**fields)
    save(tmp_path / "model", config, variables, form="online")
    again, read = load(tmp_path / "model")
    assert again.precisions() == config.precisions()
    assert dataclasses.replace(again, precision=config.precision, num_kv_heads=config.num_kv_heads) == config
    expected = flatten_dict(variables["params"], sep="/")
    if config.embedding_dtype == "bfloat16":  # the forward pass rounds it, so it is stored rounded
        expected["embed/embedding"] = expected["embed/embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    assert_equal_variables(read["params"], unflatten_dict(expected, sep="/"))
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(
        again.module().apply(read, tokens).logits, config.module().apply(variables, tokens).logits
    )


def test_float_models_are_plain(tmp_path: Path) -> None:
    config, variables = random_model(precision="float32", norm_placement="pre", mlp="silu_glu")
    save(tmp_path / "model", config, variables, form="plain")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    again, read = load(tmp_path / "model")
    assert again == config
    assert_equal_variables(read, variables)


def test_shards_and_their_index(tmp_path: Path) -> None:
    config, variables = random_model()
    limit = 20_000
    save(tmp_path / "model", config, variables, form="online", shard_bytes=limit)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    total = 0
    for file in files:
        with safe_open(file, "np") as part:  # the official reader
            sizes = [part.get_tensor(name).nbytes for name in part.keys()]  # noqa: SIM118
            assert part.metadata()["format"] == "pt"
        assert sum(sizes) <= limit or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    assert_equal_variables(load(tmp_path / "model")[1], variables)


def test_dtype_none_is_lossless_and_bfloat16_rounds(tmp_path: Path) -> None:
    config, variables = random_model()
    save(tmp_path / "exact", config, variables, form="online")
    assert open_tensors(tmp_path / "exact")["model.norm.weight"].dtype == np.float32
    save(tmp_path / "rounded", config, variables, form="online", dtype="bfloat16")
    tensors = open_tensors(tmp_path / "rounded")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    weight = variables["params"]["layers_0"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], weight.astype(jnp.bfloat16))


WORDS = json.dumps(
    {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "</s>": 2}, "unk_token": "a"},
    }
)  # fmt: skip


def test_the_tokenizer_and_its_end_token(tmp_path: Path) -> None:
    config, variables = random_model()
    save(tmp_path / "model", config, variables, form="online", tokenizer=from_json(WORDS))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == 2
    text = (tmp_path / "model" / "tokenizer.json").read_text()
    np.testing.assert_array_equal(from_json(text).encode("b a"), [1, 0])


@pytest.mark.parametrize(
    ("fields", "form", "message"),
    [
        ({}, "gguf", "form is 'gguf', expected one of plain, online"),
        ({}, "plain", r"layers_0/attention/q_proj has weight='ternary_absmean'.*form 'plain' holds only"),
        ({"precision": "float32"}, "online", "needs ternary projections, but all of them are float"),
        ({"precision": "bitnet_b158_channel"}, "online", "granularity='channel'"),
        ({"precision": "bitnet"}, "packed", "q_proj has weight='binary"),
        ({"precision": "paretoq_2"}, "packed", "scale='learned'"),
        ({"precision": "bitnet_a48"}, "packed", "q_proj has .*activation='int4'"),
        ({"head": "int8"}, "online", "lm_head has weight='int8'"),
        (
            {"tie_embeddings": False, "precision": (("lm_head", "bitnet_b158"), ("*", "bitnet_b158"))},
            "online",
            "lm_head has weight='ternary_absmean'",
        ),
        ({"attention": "linear"}, "online", "cannot hold model.attention='linear'"),
        ({"attention_scale": 1.0}, "online", "cannot hold model.attention_scale=1.0"),
        ({"position": "learned"}, "online", "cannot hold model.position='learned'"),
        ({"causal": False}, "online", "cannot hold model.causal=False"),
        ({"num_classes": 3}, "online", "classifier|num_classes"),
        ({"kv_bits": 4}, "online", "cannot hold model.kv_bits=4"),
        ({"norm": "layernorm"}, "online", "cannot hold model.norm='layernorm'"),
        ({"norm_scale": False}, "online", "cannot hold model.norm_scale=False"),
        ({"norm_placement": "inside"}, "online", "norm_placement='inside' has no Hugging Face form"),
        ({"mlp": "gelu"}, "online", "mlp='gelu' has no Hugging Face form"),
        ({"head_dim": 16}, "online", "head_dim=16 with 4 heads has no form with sub norms"),
        ({"inside_norm": True, "precision": "float32"}, "plain", "cannot hold model.inside_norm=True"),
        ({"ffn_size": 62}, "packed", "gate_proj has 62 outputs, expected a multiple of 4"),
        ({"ffn_size": 62}, "bitlinear", "gate_proj has 62 outputs, expected a multiple of 4"),
    ],
)
def test_what_a_form_cannot_hold_is_refused(
    tmp_path: Path, fields: dict[str, Any], form: str, message: str
) -> None:
    config = ModelConfig(**(SMALL | fields))
    with pytest.raises(ValueError, match=message) as error:
        save(tmp_path / "model", config, {"params": {}}, form=form)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_image_models_are_refused(tmp_path: Path) -> None:
    config = VisionTransformerConfig(
        image_size=8, patch_size=4, hidden_size=32, num_layers=1, num_heads=4, ffn_size=64, num_classes=2
    )
    with pytest.raises(ValueError, match="got an image model"):
        save(tmp_path / "model", config, {"params": {}}, form="online")  # type: ignore[arg-type]


def _drop(params: dict[str, Any]) -> None:
    del params["layers_0"]["mlp"]["up_proj"]


def _extra(params: dict[str, Any]) -> None:
    params["layers_0"]["attention"]["probability_scale"] = jnp.ones(())


def _nan(params: dict[str, Any]) -> None:
    params["final_norm"]["scale"] = jnp.full((32,), jnp.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"layers_0/mlp/up_proj/weight: got none, expected \[64, 32\]"),
        (_extra, r"probability_scale: got \[\], expected no such parameter"),
        (_nan, "final_norm/scale contains NaN"),
    ],
)
def test_variables_of_another_model_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    config, variables = random_model()
    change(variables["params"])
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "model", config, variables, form="online")
    assert not any(tmp_path.iterdir())


def test_packed_models_have_no_online_form(tmp_path: Path) -> None:
    config, variables = random_model()
    with pytest.raises(ValueError, match="is packed and has no latent weights"):
        save(tmp_path / "model", config, pack(variables["params"], config), form="online")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"tokenizer": ByteTokenizer()}, "a byte tokenizer has no Hugging Face form"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    config, variables = random_model()
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "model", config, variables, form="online", **arguments)
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    config, variables = random_model()
    (tmp_path / "model").mkdir()
    with pytest.raises(StorageError, match="exists"):
        save(tmp_path / "model", config, variables, form="online")
