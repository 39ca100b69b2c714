"""Models written to GGUF files: types, and what is refused before anything is written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.interop import gguf
from bitnet_jax.interop.gguf_export import write
from bitnet_jax.interop.gguf_file import Value, read
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.packed import packing
from bitnet_kernels import unpack

TINY = ModelConfig(
    vocab_size=32, hidden_size=256, num_layers=1, num_heads=4, num_kv_heads=2, ffn_size=512, max_length=16
)
FLOAT = dataclasses.replace(TINY, precision="float32", mlp="silu_glu", norm_placement="pre")


def variables(config: ModelConfig) -> dict[str, Any]:
    """Random parameters; faster than to compile the initializers."""
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), shapes)


def types(path: Path) -> dict[str, str]:
    return {name: tensor.type.name for name, tensor in read(path).tensors.items()}


def test_a_latent_model_is_written_as_its_packed_one(tmp_path: Path) -> None:
    latent = variables(TINY)
    packed = packing.pack(latent["params"], TINY)
    for name, tree in {"a": latent, "b": packed}.items():
        write(tmp_path / name, TINY, tree)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    config, got = gguf.read(tmp_path / "a")
    assert config == TINY
    for ours, theirs in zip(
        jax.tree.leaves(got["packed"], is_leaf=lambda x: hasattr(x, "codes")),
        jax.tree.leaves(packed["packed"], is_leaf=lambda x: hasattr(x, "codes")),
        strict=True,
    ):
        np.testing.assert_array_equal(unpack(ours), unpack(theirs))
        np.testing.assert_array_equal(ours.scale, theirs.scale)
    jax.tree.map(np.testing.assert_array_equal, got["params"], packed["params"])


def test_the_default_types_hold_every_value(tmp_path: Path) -> None:
    tree = variables(FLOAT)
    params = tree["params"]
    params["embed"]["embedding"] = params["embed"]["embedding"].astype("float16").astype("float32")
    q = params["layers_0"]["attention"]["q_proj"]
    q["weight"] = (1e6 * q["weight"]).astype("bfloat16").astype("float32")
    write(tmp_path / "m", FLOAT, tree)
    found = types(tmp_path / "m")
    assert (found["token_embd.weight"], found["blk.0.attn_q.weight"]) == ("F16", "BF16")
    assert found["blk.0.attn_k.weight"] == found["output_norm.weight"] == "F32"
    _, got = gguf.read(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, got, tree)


@pytest.mark.parametrize(
    ("config", "type_name", "matrices"),
    [(TINY, None, "i2_s"), (TINY, "tq1_0", "TQ1_0"), (FLOAT, "Q8_0", "Q8_0"), (FLOAT, "f16", "F16")],
)
def test_types_by_name(tmp_path: Path, config: ModelConfig, type_name: str | None, matrices: str) -> None:
    write(tmp_path / "m", config, variables(config), type=type_name, embedding="q4_0")
    found = types(tmp_path / "m")
    assert found.pop("token_embd.weight") == "Q4_0"
    assert {kind for name, kind in found.items() if "norm" not in name} == {matrices}
    assert (
        read(tmp_path / "m").metadata["general.file_type"].value
        == {"i2_s": 40, "TQ1_0": 36, "Q8_0": 7, "F16": 1}[matrices]
    )


def test_a_type_applies_to_the_matrices_that_it_can_hold(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, precision=(("*q_proj", "float32"), ("*", "bitnet_b158")))
    for name, kinds in {"tq2_0": {"F32", "TQ2_0"}, "q8_0": {"Q8_0", "i2_s"}}.items():
        write(tmp_path / name, config, variables(config), type=name)
        found = {
            kind
            for tensor, kind in types(tmp_path / name).items()
            if tensor.startswith("blk") and "norm" not in tensor
        }
        assert found == kinds


def test_further_metadata_and_the_name(tmp_path: Path) -> None:
    write(
        tmp_path / "m",
        TINY,
        variables(TINY),
        name="mine",
        metadata={"tokenizer.ggml.pre": Value("string", "x")},
    )
    metadata = read(tmp_path / "m").metadata
    assert (metadata["general.name"].value, metadata["tokenizer.ggml.pre"].value) == ("mine", "x")
    assert metadata["general.architecture"].value == "bitnet-b1.58"


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"precision": "bitnet"}, {}, "weight='binary_centred', expected a ternary quantizer"),
        ({"precision": "bitnet_weight_only"}, {}, "activation='none', expected 'int8'"),
        ({"precision": "bitnet_a48"}, {}, "q_proj: the precision has activation='int4'"),
        ({"precision": "bitnet_v2"}, {}, "hadamard='block', expected False"),
        ({"kv_bits": 4}, {}, "model.kv_bits is 4"),
        ({}, {"type": "q8_0"}, "type='q8_0' is for float matrices; the model has none"),
        (
            {"precision": "float32"},
            {"type": "i2_s"},
            "type='i2_s' is for ternary matrices; the model has none",
        ),
        ({}, {"type": "q9"}, "the tensor type 'q9'"),
        ({"precision": "float32"}, {"type": "q4_k"}, "Q4_K can only be read"),
        ({"precision": "bitnet_b158_group64"}, {}, "choose TQ2_0"),
        ({"precision": "bitnet_b158_group64"}, {"type": "tq2_0"}, "groups of a multiple of 256"),
        ({}, {"embedding": "i2_s"}, "values other than 0 and one magnitude"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "m", config, variables(config), **arguments)
    assert not os.listdir(tmp_path)
