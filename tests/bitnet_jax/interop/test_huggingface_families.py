"""Families of models against transformers: fixtures/*.npz, written by make_fixtures.py, each loaded as a folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from bitnet_jax.inference.cache import init_cache
from bitnet_jax.inference.generation import generate
from bitnet_jax.interop.huggingface import load
from bitnet_jax.interop.huggingface_export import save
from bitnet_jax.interop.huggingface_rope import read_rope
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.models.transformer import Transformer
from bitnet_jax.nn.rotary import frequencies
from bitnet_jax.packed.packing import abstract
from bitnet_kernels import PackedArray, unpack

pytestmark = pytest.mark.extended

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = sorted(path.stem for path in FIXTURES.glob("*.npz") if path.stem != "rope")
# Logits have a standard deviation of 1.5 to 6 and differ by 1e-5, the order of float32 sums. An activation code that is
# rounded otherwise would change them by 0.01 or more; make_fixtures.py avoids rounding ties.
TOLERANCE = 2e-4
EXPORTED_AS = {"llama_bias_packed": "bitlinear"}  # offline models with biases: see `config_json`

SAME_AS_LLAMA = {"mistral_head_dim"}  # without a window there is no difference


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


def config_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(str(arrays(name)["config"]))
    return content


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        (root / name).mkdir()
        (root / name / "config.json").write_text(str(arrays(name)["config"]))
        weights = {
            key.removeprefix("weights/"): value
            for key, value in arrays(name).items()
            if key.startswith("weights/")
        }
        save_file(weights, root / name / "model.safetensors")
    return root


@functools.cache
def loaded(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    return load(folder)


@functools.partial(jax.jit, static_argnames="config")
def padded_logits(config: ModelConfig, variables: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return Transformer(config).apply(variables, tokens, mask=mask).logits


@functools.partial(jax.jit, static_argnames="config")
def cached_logits(config: ModelConfig, variables: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Through the cache, one token at a time."""

    def step(cache: Any, column: Any) -> Any:
        output = Transformer(config).apply(
            variables, column[0][:, None], mask=column[1][:, None], cache=cache
        )
        return output.cache, output.logits[:, 0]

    B, T = tokens.shape
    _, logits = jax.lax.scan(step, init_cache(config, B, T + 3), (tokens.T, mask.T))
    return jnp.moveaxis(logits, 0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_logits(folders: Path, name: str) -> None:
    (config, variables), truth = loaded(folders / name), arrays(name)
    tokens, mask = jnp.asarray(truth["input_ids"]), jnp.asarray(truth["pad_mask"], bool)
    whole = padded_logits(config, variables, tokens, jnp.ones_like(mask))
    assert np.abs(whole - truth["logits"]).max() <= TOLERANCE
    padded = padded_logits(config, variables, jnp.asarray(truth["pad_input_ids"]), mask)
    assert np.abs(np.asarray(padded) - truth["pad_logits"])[truth["pad_mask"] > 0].max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_logits_through_the_cache(folders: Path, name: str) -> None:
    """The left-padded batch and, as one more row of it, the greedily generated sequence."""
    (config, variables), truth = loaded(folders / name), arrays(name)
    B, T = truth["pad_mask"].shape
    written = np.concatenate([truth["prompt_ids"], truth["greedy_ids"]], axis=1)
    first, length = truth["prompt_ids"].shape[1] - 1, max(T, written.shape[1])

    def rows(batch: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        ends = [np.pad(part, ((0, 0), (0, length - part.shape[1]))) for part in (batch, sequence)]
        return np.concatenate(ends)

    tokens = rows(truth["pad_input_ids"], written)
    mask = rows(truth["pad_mask"], np.ones_like(written)).astype(bool)
    logits = np.asarray(cached_logits(config, variables, jnp.asarray(tokens), jnp.asarray(mask)))
    assert np.abs(logits[:B, :T] - truth["pad_logits"])[truth["pad_mask"] > 0].max() <= TOLERANCE
    steps = logits[B, first : written.shape[1] - 1]
    assert np.abs(steps - truth["step_logits"]).max() <= TOLERANCE
    np.testing.assert_array_equal(steps.argmax(-1), truth["greedy_ids"][0])


@pytest.mark.parametrize("name", ["mistral_bitlinear", "qwen2_window", "smollm3"])
def test_greedy_generation(folders: Path, name: str) -> None:
    """Beyond the sliding window, with a prompt in a wider bucket."""
    (config, variables), truth = loaded(folders / name), arrays(name)
    expected = truth["greedy_ids"]
    got = generate(
        config, variables, jnp.asarray(truth["prompt_ids"]), max_new_tokens=expected.shape[1]
    ).tokens
    np.testing.assert_array_equal(got, expected)


def test_padding_inside_a_row_does_not_narrow_the_window(folders: Path) -> None:
    """As between a prompt that is padded to its bucket and the tokens generated after it."""
    (config, variables), truth = loaded(folders / "mistral"), arrays("mistral")
    B, T, gap = 3, truth["input_ids"].shape[1], 4
    tokens = np.tile(truth["input_ids"][:1], (B, 1))
    gapped = np.insert(tokens, [8] * gap, 0, axis=1)[:, :T]
    mask = np.ones((B, T), bool)
    expected = np.asarray(cached_logits(config, variables, jnp.asarray(tokens), jnp.asarray(mask)))
    mask[:, 8 : 8 + gap] = False
    logits = np.asarray(cached_logits(config, variables, jnp.asarray(gapped), jnp.asarray(mask)))
    np.testing.assert_allclose(
        np.delete(logits, range(8, 8 + gap), axis=1), expected[:, :-gap], atol=TOLERANCE
    )


@pytest.mark.parametrize("name", MODELS)
def test_shapes_match_the_model(folders: Path, name: str) -> None:
    config, variables = loaded(folders / name)
    expected = abstract(config) if "packed" in variables else init_shapes(config)
    got = flatten_dict(
        jax.tree.map(jnp.shape, variables, is_leaf=lambda x: isinstance(x, PackedArray)), sep="/"
    )
    wanted = flatten_dict(
        jax.tree.map(jnp.shape, expected, is_leaf=lambda x: isinstance(x, PackedArray)), sep="/"
    )
    assert {path: shape for path, shape in got.items()} == {
        path: shape for path, shape in wanted.items() if path in got or not path.startswith("packed/")
    }


def init_shapes(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))


@pytest.mark.parametrize("name", MODELS)
def test_export_and_back(folders: Path, tmp_path: Path, name: str) -> None:
    config, variables = loaded(folders / name)
    kept = config_of(name)
    form = EXPORTED_AS.get(name, _form(kept.get("quantization_config")))
    save(tmp_path / "model", config, variables, form=form)
    again, read = load(tmp_path / "model")
    assert again == config
    expected = flatten_dict(variables, sep="/")
    for path, value in flatten_dict(read, sep="/").items():
        if isinstance(value, PackedArray):
            np.testing.assert_array_equal(unpack(value), unpack(expected[path]), err_msg=path)
            np.testing.assert_allclose(value.scale, expected[path].scale, rtol=2.0**-22)
        else:
            np.testing.assert_array_equal(value, expected[path], err_msg=path)
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["model_type"] == ("llama" if name in SAME_AS_LLAMA else kept["model_type"])


def _form(quantization: dict[str, Any] | None) -> str:
    if quantization is None:
        return "plain"
    return "online" if quantization.get("quantization_mode") == "online" else "bitlinear"


def test_rope_scalings_match_the_library() -> None:
    truth = arrays("rope")
    names = sorted(key.removesuffix("/config") for key in truth if key.endswith("/config"))
    assert len(names) == 20
    for name in names:
        content = json.loads(str(truth[f"{name}/config"]))
        theta, scaling = read_rope(content, 1e4, content["max_position_embeddings"])
        assert scaling is not None
        expected = truth[f"{name}/frequencies"]
        # The library computes in float32.
        np.testing.assert_allclose(
            frequencies(2 * len(expected), theta, scaling), expected, rtol=2e-6, err_msg=name
        )
        np.testing.assert_allclose(scaling.magnitude, truth[f"{name}/magnitude"], rtol=1e-12, err_msg=name)
