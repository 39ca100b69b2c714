"""Hugging Face models: the same checkpoints run by transformers and by this library.

`oracles/hf_bitnet/<name>` holds a tiny random checkpoint and, in oracle.npz, what Hugging Face transformers
computes with it. Measured differences of the logits (std 3) are 2e-6 to 2e-5, from the order of float32 sums.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from bitnet_jax.inference.cache import init_cache
from bitnet_jax.inference.generation import generate
from bitnet_jax.interop.huggingface import load, pack_weight, tensor_names, unpack_weight
from bitnet_jax.interop.safetensors_folder import open_tensors
from bitnet_jax.models import ModelConfig
from bitnet_jax.models.transformer import Block, Transformer
from bitnet_kernels import cpu, unpack

pytestmark = pytest.mark.extended

FLOAT = ("bitnet_plain_bf16_untied", "bitnet_plain_fp32_tied", "llama_plain_fp32_untied")
ONLINE = (
    "bitnet_online_bf16_gqa20x5",
    "bitnet_online_bf16_tied",
    "bitnet_online_fp32_untied",
    "llama_online_bf16_untied",
)
OFFLINE = (
    "bitnet_autobit_packed_bf16_tied",
    "bitnet_autobit_packed_fp32_untied",
    "bitnet_autobit_unpacked_bf16_tied",
    "bitnet_bitlinear_packed_bf16_tied",
    "bitnet_bitlinear_packed_fp32_untied",
    "llama_bitlinear_packed_bf16_untied",
    "llama_bitlinear_rmsnorm_bf16_untied",
)
EVERY = FLOAT + ONLINE + OFFLINE

# SPEC section 6: 30 times the noise of float32 sums, a 15th of one activation code rounded otherwise.
LOGIT_TOLERANCE = 1e-3
NEW_TOKENS = 10
# Compilation dominates the time of these tests, and each compiled program runs only once.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@functools.cache
def loaded(folder: Path, dtype: str = "float32", packed: bool = True) -> tuple[ModelConfig, dict[str, Any]]:
    return load(folder, dtype=dtype, packed=packed)


@functools.cache
def oracle(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "oracle.npz") as arrays:
        return dict(arrays)


def tokens_of(ids: np.ndarray) -> jax.Array:
    return jnp.asarray(ids, jnp.int32)


def forward(config: ModelConfig, variables: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return Transformer(config).apply(variables, tokens, mask=mask).logits


logits_of = jax.jit(forward, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config", compiler_options=QUICK_COMPILE)
def greedy(config: ModelConfig, variables: Any, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decodes one token at a time through the cache, prompt included: ids [N, B] and the logits that selected them."""
    B, T = prompt.shape

    def step(state: Any, prompted: jax.Array) -> tuple[Any, Any]:
        cache, token = state
        token = jnp.where(prompted >= 0, prompted, token)
        output = Transformer(config).apply(variables, token[:, None], cache=cache)
        token = jnp.argmax(output.logits[:, 0], axis=-1).astype(jnp.int32)
        return (output.cache, token), (token, output.logits[:, 0])

    length = T + NEW_TOKENS - 1
    inputs = jnp.full((length, B), -1, jnp.int32).at[:T].set(prompt.T)
    start = init_cache(config, B, length), jnp.zeros((B,), jnp.int32)
    _, (ids, logits) = jax.lax.scan(step, start, inputs)
    return ids[T - 1 :], logits[T - 1 :]


def padded_difference(got: jax.Array, expected: np.ndarray, mask: np.ndarray) -> float:
    return float(np.abs((np.asarray(got) - expected)[mask.astype(bool)]).max())


def test_every_checkpoint_is_covered(oracles: Path) -> None:
    assert {path.name for path in (oracles / "hf_bitnet").iterdir() if path.is_dir()} == set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_parameter_shapes_match_the_model(oracles: Path, name: str) -> None:
    config, variables = loaded(oracles / "hf_bitnet" / name, packed=False)
    tokens = jnp.zeros((1, 2), jnp.int32)
    expected = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    got = {path: (value.shape, value.dtype) for path, value in flatten_dict(variables["params"]).items()}
    assert got == {path: (value.shape, value.dtype) for path, value in flatten_dict(expected).items()}


@pytest.mark.parametrize("name", EVERY)
def test_logits(oracles: Path, name: str) -> None:
    folder = oracles / "hf_bitnet" / name
    (config, variables), truth = loaded(folder), oracle(folder)
    assert ("packed" in variables) == (name in OFFLINE)

    whole = np.ones(truth["input_ids"].shape)
    logits = logits_of(config, variables, tokens_of(truth["input_ids"]), jnp.asarray(whole, bool))
    assert padded_difference(logits, truth["fp32/logits"], whole) <= LOGIT_TOLERANCE

    mask = truth["pad_attention_mask"]
    padded = logits_of(config, variables, tokens_of(truth["pad_input_ids"]), jnp.asarray(mask, bool))
    assert padded_difference(padded, truth["fp32/pad_logits"], mask) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", EVERY)
def test_greedy_steps_with_cache(oracles: Path, name: str) -> None:
    folder = oracles / "hf_bitnet" / name
    (config, variables), truth = loaded(folder), oracle(folder)
    prompt = tokens_of(truth["prompt_ids"])
    expected = truth["fp32/greedy_ids"][0, prompt.shape[1] :]

    def difference(ids: jax.Array, logits: jax.Array) -> float:
        np.testing.assert_array_equal(ids[:, 0], expected)
        return float(np.abs(np.asarray(logits[:, 0]) - truth["fp32/greedy_step_logits"]).max())

    compiled = difference(*greedy(config, variables, prompt))
    if compiled > LOGIT_TOLERANCE:
        # A single activation at a rounding tie (SPEC section 6). Seen in bitnet_online_bf16_gqa20x5 at
        # full optimization: depending on the order of float32 sums x * s is -21.500008 or -21.499996 (the library's is
        # 2e-5 from the tie). The difference is then one code; another summation order must not show it.
        assert compiled <= 0.25
        with jax.disable_jit():
            assert difference(*greedy(config, variables, prompt)) <= LOGIT_TOLERANCE


def test_generate_reproduces_the_greedy_ids(oracles: Path) -> None:
    folder = oracles / "hf_bitnet" / OFFLINE[0]
    (config, variables), truth = loaded(folder), oracle(folder)
    prompt = tokens_of(truth["prompt_ids"])
    got = generate(config, variables, prompt, max_new_tokens=NEW_TOKENS).tokens
    np.testing.assert_array_equal(got, truth["fp32/greedy_ids"][:, prompt.shape[1] :])


def test_hidden_states(oracles: Path) -> None:
    """Layer by layer: if the logits differ, this shows the first layer that does."""
    folder = oracles / "hf_bitnet" / "llama_bitlinear_rmsnorm_bf16_untied"
    (config, variables), truth = loaded(folder), oracle(folder)

    @jax.jit
    def blocks(tokens: jax.Array) -> Any:
        def keep(module: object, method: str) -> bool:
            return isinstance(module, Block) and method == "__call__"

        model = Transformer(config)
        _, state = model.apply(variables, tokens, capture_intermediates=keep, mutable="intermediates")
        return state["intermediates"]

    captured = blocks(tokens_of(truth["input_ids"]))
    for i in range(config.num_layers):
        hidden = captured[f"layers_{i}"]["__call__"][0][0]
        # Hidden states reach a magnitude of 5, and sums of up to 96 terms differ by a few float32 ulp.
        np.testing.assert_allclose(hidden, truth[f"fp32/hs/layer{i}_out"], rtol=0, atol=1e-4)


@functools.partial(jax.jit, static_argnames="config", compiler_options=QUICK_COMPILE)
def loss_and_gradient(config: ModelConfig, params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    def loss(params: Any) -> jax.Array:
        logits = Transformer(config).apply({"params": params}, tokens).logits
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("name", FLOAT + ONLINE)
def test_loss_and_gradients(oracles: Path, name: str) -> None:
    folder = oracles / "hf_bitnet" / name
    (config, variables), truth = loaded(folder), oracle(folder)
    loss, gradient = loss_and_gradient(config, variables["params"], tokens_of(truth["input_ids"]))
    assert abs(loss - truth["loss"]) <= 1e-5 * abs(truth["loss"])

    ours = {theirs: path for path, (theirs, _) in tensor_names(config).items()}
    gradient = flatten_dict(gradient, sep="/")
    keys = [key for key in truth if key.startswith("grad/")]
    assert len(keys) >= 8
    for key in keys:
        expected = truth[key]
        difference = np.abs(np.asarray(gradient[ours[key.removeprefix("grad/")]]) - expected).max()
        # The requirement is 1e-4. Float32 noise is about 1e-6, a wrong scale or estimator of order 1.
        assert difference <= 1e-4 * np.abs(expected).max(), key


@pytest.mark.parametrize("name", [FLOAT[0], ONLINE[1], OFFLINE[0], OFFLINE[3]])
def test_bfloat16_error_is_comparable_to_that_of_transformers(oracles: Path, name: str) -> None:
    """bfloat16 is not an exact test (SPEC section 6): our error against float32 may be as large as theirs."""
    folder = oracles / "hf_bitnet" / name
    (config, variables), truth = loaded(folder, dtype="bfloat16"), oracle(folder)
    tokens = tokens_of(truth["input_ids"])
    logits = np.asarray(logits_of(config, variables, tokens, jnp.ones(tokens.shape, bool)))
    exact, theirs = truth["fp32/logits"], truth["bf16/logits"]
    error = np.abs(logits - exact).mean()
    assert (
        1e-3 < error < 1.5 * np.abs(theirs - exact).mean()
    )  # any smaller, and it was not computed in bfloat16
    assert (logits.argmax(-1) == exact.argmax(-1)).mean() >= 0.87


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_weights_as_latent_weights(oracles: Path, name: str) -> None:
    folder = oracles / "hf_bitnet" / name
    config, variables = loaded(folder, packed=False)
    assert "packed" not in variables
    latent = flatten_dict(variables["params"], sep="/")
    precisions = config.precisions()
    for path, packed in flatten_dict(loaded(folder)[1]["packed"], sep="/").items():
        quantized = precisions[path.removesuffix("/weight")].quantize_weight(latent[path])
        np.testing.assert_array_equal(quantized.codes, unpack(packed))
        # The quantizer's mean of |W| is a float32 sum over up to 24,576 weights; 4e-6 was measured.
        np.testing.assert_allclose(quantized.scale, packed.scale, rtol=2e-5)


@pytest.mark.parametrize("name", [OFFLINE[1], OFFLINE[3]])
def test_logits_of_offline_models_with_latent_weights(oracles: Path, name: str) -> None:
    folder = oracles / "hf_bitnet" / name
    (config, variables), truth = loaded(folder, packed=False), oracle(folder)
    mask = np.ones(truth["input_ids"].shape)
    logits = logits_of(config, variables, tokens_of(truth["input_ids"]), jnp.asarray(mask, bool))
    assert padded_difference(logits, truth["fp32/logits"], mask) <= LOGIT_TOLERANCE


def test_bit_layout_of_packed_weights() -> None:
    """The example documented by the library (papers/bitnet_line.md 6.4)."""
    packed = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8)
    codes = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]
    np.testing.assert_array_equal(unpack_weight(packed), np.array(codes, np.int8))
    again, scale = pack_weight(jnp.asarray(codes, jnp.float32))
    np.testing.assert_array_equal(again, packed)
    assert scale == np.float32(13 / 16)  # three of the sixteen codes are zeros


def test_pack_weight_needs_whole_bytes() -> None:
    with pytest.raises(ValueError, match="6 outputs, expected a multiple of 4"):
        pack_weight(jnp.ones((6, 4), jnp.float32))


def test_packing_the_master_weights_gives_the_published_bytes(oracles: Path) -> None:
    """Four folders hold the same model: latent, packed for either class, and unpacked."""
    folder = oracles / "hf_bitnet"
    master = open_tensors(folder / "bitnet_online_bf16_tied")
    times = open_tensors(folder / "bitnet_autobit_packed_bf16_tied")
    plain = open_tensors(folder / "bitnet_autobit_unpacked_bf16_tied")
    divides = open_tensors(folder / "bitnet_bitlinear_packed_bf16_tied")
    projections = [name for name in master if name.endswith("_proj.weight")]
    assert len(projections) == 3 * 7
    for name in projections:
        packed, scale = pack_weight(jnp.asarray(master[name].astype(np.float32)))
        np.testing.assert_array_equal(packed, times[name])
        np.testing.assert_array_equal(packed, divides[name])
        np.testing.assert_array_equal(unpack_weight(packed), plain[name].astype(np.float32))
        for stored, expected in ((times, scale), (plain, scale), (divides, 1 / scale)):
            value = stored[f"{name}_scale"].astype(np.float32)
            assert abs(value - expected) <= 2.0**-8 * expected  # one bfloat16 ulp


@pytest.mark.parametrize("name", EVERY)
def test_config_matches_the_file(oracles: Path, name: str) -> None:
    """Covers what hardly affects the logits: an epsilon of 1e-6 instead of 1e-5 changes them by 1e-4."""
    config, variables = loaded(oracles / "hf_bitnet" / name)
    text = json.loads((oracles / "hf_bitnet" / name / "config.json").read_text())
    rope = text.get("rope_parameters", text)
    assert config.norm_eps == text["rms_norm_eps"]
    assert config.rope_theta == rope["rope_theta"]
    assert config.max_length == text["max_position_embeddings"]
    assert config.tie_embeddings == name.endswith("_tied") or "gqa" in name
    assert config.embedding_dtype == ("bfloat16" if "bf16" in name else "float32")
    assert config.inside_norm == ("rmsnorm" in name)
    stored = config.embedding_dtype if "packed" in variables else "float32"
    assert variables["params"]["embed"]["embedding"].dtype == stored


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("isa", ["avx512vnni", "avx2", "scalar"])
def test_packed_models_under_each_instruction_set(
    oracles: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last in the file, because it clears the compilation caches: the variable is read at tracing time."""
    if isa not in cpu.available_isas():
        pytest.skip(f"{isa} is not available here: {cpu.unavailable() or cpu.available_isas()}")
    if isa != cpu.isa():
        jax.clear_caches()
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    for name in OFFLINE:
        folder = oracles / "hf_bitnet" / name
        (config, variables), truth = loaded(folder), oracle(folder)
        inputs = tokens_of(truth["pad_input_ids"]), jnp.asarray(truth["pad_attention_mask"], bool)
        program = logits_of.lower(config, variables, *inputs).as_text().splitlines()
        # All except the embedding look-up and the norms, which are the same for all.
        others = ("@bitnet_kernels_lookup", "@bitnet_kernels_rms_norm")
        calls = [
            line
            for line in program
            if "@bitnet_kernels_" in line and not any(name in line for name in others)
        ]
        shapes = {shape for path, shape in config.linear_shapes().items() if path != "lm_head"}
        assert len(calls) >= len(shapes)  # identical programs may share one function
        assert all(f'isa = "{isa}"' in line for line in calls)
        logits = logits_of(config, variables, *inputs)
        difference = padded_difference(logits, truth["fp32/pad_logits"], truth["pad_attention_mask"])
        assert difference <= LOGIT_TOLERANCE, name


@pytest.fixture(scope="module", autouse=True)
def no_trace_of_a_forced_instruction_set() -> Iterator[None]:
    yield
    jax.clear_caches()
