"""Conversion between formats: what a format cannot hold is refused by name; a tokenizer that is too large warns."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax.data.bpe import train_bpe
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.text import Document
from bitnet_jax.inference.streaming import stream
from bitnet_jax.model_folders import LoadedModel, load_text_model, save_model
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.tools.conversion import convert

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "ffn_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "max_length": 16,
}  # fmt: skip
FLOAT = ModelConfig(**SHAPE, precision="float32", norm_placement="pre", mlp="silu_glu", tie_embeddings=False)
TERNARY = ModelConfig(**SHAPE, precision="bitnet_b158", norm_placement="sub", mlp="relu2_glu")


def loaded(config: ModelConfig, tokenizer: Any = None) -> Any:
    return LoadedModel(
        "run", config, init_variables(config, jax.random.key(2)), tokenizer, None, Conversation()
    )


@pytest.mark.parametrize("packs", [False, True])
def test_outputs_that_do_not_share_bytes_have_only_the_unpacked_form(tmp_path: Path, packs: bool) -> None:
    model = loaded(dataclasses.replace(TERNARY, ffn_size=130))
    save_model(tmp_path / "a", model, "packed" if packs else "huggingface")
    for form in ("packed", "bitlinear"):
        with pytest.raises(
            ValueError, match="layers_0/mlp/gate_proj has 130 outputs, expected a multiple of 4"
        ):
            convert(tmp_path / "a", tmp_path / "b", f"huggingface-{form}")
    assert not (tmp_path / "b").exists()
    assert convert(tmp_path / "a", tmp_path / "c", "huggingface-unpacked").weights.lossless


@pytest.mark.parametrize("to", ["gguf", "gguf:Q8_0", "gguf:F32", "huggingface"])
@pytest.mark.parametrize("leaf", ["embed/embedding", "layers_1/mlp/up_proj/weight", "final_norm/scale"])
def test_weights_that_are_not_finite_are_refused_by_name_before_anything_is_written(
    tmp_path: Path, to: str, leaf: str
) -> None:
    model = loaded(FLOAT)
    leaves = flatten_dict(model.variables["params"], sep="/")
    leaves[leaf] = leaves[leaf].at[..., 3].set(np.nan)
    params = unflatten_dict(leaves, sep="/")
    with pytest.raises(ValueError, match=f"^{leaf} .*NaN or infinity"):
        save_model(tmp_path / "new", model._replace(variables={"params": params}), to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["packed", "huggingface"])
@pytest.mark.parametrize("rows", [200, 300, 400])
def test_a_tokenizer_beyond_the_embedding_warns_and_only_its_extra_tokens_are_refused(
    tmp_path: Path, to: str, rows: int
) -> None:
    text = "ternary weights are minus one, zero and one; binary weights are minus one and one. " * 20
    tokenizer = train_bpe([Document("text", text)], 280)
    save_model(tmp_path / "m", loaded(dataclasses.replace(FLOAT, vocab_size=rows), tokenizer), to)
    model = load_text_model(tmp_path / "m")
    assert model.tokenizer is not None
    answer = partial(stream, model.config, model.variables, model.tokenizer, max_new_tokens=1)
    if rows >= tokenizer.vocab_size:  # unused rows
        answer("ternary weights")
        return
    known = np.array([3, 5])
    with pytest.warns(UserWarning, match=f"the tokenizer has 280 tokens, the model {rows}"):
        list(answer(known))
    with (
        pytest.warns(UserWarning, match="extra tokens is refused"),
        pytest.raises(DataError, match=f"with the id {rows}, expected ids below {rows}"),
    ):
        answer(np.array([3, rows]))
