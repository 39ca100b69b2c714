"""Models in GGUF files: the same model as packed safetensors, and what transformers computes with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from bitnet_jax.inference.generation import generate
from bitnet_jax.interop import gguf, gguf_export, gguf_file, gguf_writer, huggingface
from bitnet_jax.interop.gguf_file import GgufFile, Value
from bitnet_jax.interop.gguf_ternary import Ternary, encode_ternary
from bitnet_jax.interop.gguf_types import encode, named_type
from bitnet_jax.interop.gguf_writer import NewTensor
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.models.transformer import Transformer
from bitnet_jax.packed.latent import unpack_model
from bitnet_kernels import PackedArray, cpu, unpack

pytestmark = pytest.mark.extended

TOLERANCE = 1e-3  # oracles/hf_bitnet/SPEC.md section 6
TYPES = ("i2_s", "tq1_0", "tq2_0")
TINY = ModelConfig(
    vocab_size=32, hidden_size=256, num_layers=1, num_heads=4, num_kv_heads=2, ffn_size=512, max_length=16
)


@functools.cache
def loaded(path: Path, packed: bool = True) -> tuple[ModelConfig, dict[str, Any]]:
    config, variables = gguf.read(path)
    return config, variables if packed else unpack_model(config, variables)


@functools.cache
def oracle(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "oracle.npz") as arrays:
        return dict(arrays)


@functools.partial(jax.jit, static_argnames="config")
def logits(config: ModelConfig, variables: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return Transformer(config).apply(variables, tokens, mask=mask).logits


def check(config: ModelConfig, variables: Any, truth: dict[str, np.ndarray]) -> None:
    ids = jnp.asarray(truth["input_ids"], jnp.int32)
    whole = logits(config, variables, ids, jnp.ones(ids.shape, bool))
    assert np.abs(whole - truth["fp32/logits"]).max() <= TOLERANCE
    mask = truth["pad_attention_mask"].astype(bool)
    padded = logits(config, variables, jnp.asarray(truth["pad_input_ids"], jnp.int32), jnp.asarray(mask))
    assert np.abs(np.asarray(padded) - truth["fp32/pad_logits"])[mask].max() <= TOLERANCE


@pytest.mark.parametrize("type_name", TYPES)
def test_packed_variables_are_those_of_the_safetensors(oracles: Path, type_name: str) -> None:
    folder = oracles / "gguf" / "model_tiny"
    config, variables = loaded(folder / f"model.{type_name}.gguf")
    theirs, expected = huggingface.load(folder)
    assert config.to_dict() | {"embedding_dtype": "bfloat16"} == theirs.to_dict()  # stored as float16 in GGUF
    got, wanted = (flatten_dict(tree["packed"], sep="/") for tree in (variables, expected))
    assert got.keys() == wanted.keys()
    for path, weight in wanted.items():
        np.testing.assert_array_equal(unpack(got[path]), unpack(weight))
        np.testing.assert_array_equal(got[path].scale, weight.scale)
    got, wanted = (flatten_dict(tree["params"], sep="/") for tree in (variables, expected))
    for path, value in wanted.items():
        np.testing.assert_array_equal(got[path], value.astype("float32"))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("type_name", TYPES)
def test_logits(oracles: Path, type_name: str, packed: bool) -> None:
    folder = oracles / "gguf" / "model_tiny"
    check(*loaded(folder / f"model.{type_name}.gguf", packed), oracle(folder))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("type_name", TYPES)
def test_greedy_ids(oracles: Path, type_name: str, packed: bool) -> None:
    folder = oracles / "gguf" / "model_tiny"
    truth = oracle(folder)
    prompt = jnp.asarray(truth["prompt_ids"], jnp.int32)
    expected = truth["fp32/greedy_ids"][:, prompt.shape[1] :]
    config, variables = loaded(folder / f"model.{type_name}.gguf", packed)
    got = generate(config, variables, prompt, max_new_tokens=expected.shape[1]).tokens
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("type_name", TYPES)
def test_tensors_return_byte_for_byte(oracles: Path, tmp_path: Path, type_name: str) -> None:
    original = gguf_file.read(oracles / "gguf" / "model_tiny" / f"model.{type_name}.gguf")
    gguf_export.write(tmp_path / "m.gguf", *gguf.model(original), type=type_name)
    again = gguf_file.read(tmp_path / "m.gguf")
    assert again.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        assert again.tensors[name][:2] == tensor[:2]
        np.testing.assert_array_equal(again.tensors[name].data, tensor.data)
    ours = {key: value for key, value in original.metadata.items() if key.startswith(("general.", "bitnet"))}
    for key in ours.keys() - {"general.name"}:
        assert again.metadata[key] == original.metadata[key], key


def random_variables(config: ModelConfig) -> dict[str, Any]:
    """Random parameters; faster than to compile the initializers."""
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a random model: what tests change below."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    gguf_export.write(path, TINY, random_variables(TINY))
    return path


def changed(
    path: Path,
    tmp_path: Path,
    metadata: dict[str, Value | None] | None = None,
    tensors: dict[str, Any] | None = None,
) -> GgufFile:
    """The file with other metadata (None: without the key) and tensors: (type, values or Ternary)."""
    file = gguf_file.read(path)
    entries = {k: v for k, v in (file.metadata | (metadata or {})).items() if v is not None}
    new = {
        name: NewTensor(name, t.type, t.shape, lambda t=t: np.asarray(t.data))
        for name, t in file.tensors.items()
    }
    for name, value in (tensors or {}).items():
        if value is None:
            del new[name]
            continue
        kind, content = named_type(value[0]), value[1]
        data = encode_ternary(kind.name, content) if isinstance(content, Ternary) else encode(kind, content)
        shape = content.codes.shape if isinstance(content, Ternary) else content.shape
        new[name] = NewTensor(name, kind, shape, lambda data=data: data)
    gguf_writer.write(tmp_path / "changed.gguf", entries, list(new.values()))
    return gguf_file.read(tmp_path / "changed.gguf")


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def oracle_folders(tmp_path: Path) -> Callable[[str, dict[str, np.ndarray]], Path]:
    """Writes the model of a fixture as a Hugging Face folder."""

    def folder(name: str, arrays: dict[str, np.ndarray]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(str(arrays["config"]))
        weights = {
            key.removeprefix("weights/"): value for key, value in arrays.items() if key.startswith("weights/")
        }
        save_file(weights, tmp_path / name / "model.safetensors")
        return tmp_path / name

    return folder


Q, Q_PATH = "blk.0.attn_q.weight", ("layers_0", "attention", "q_proj", "weight")


def leaf(variables: Any, path: tuple[str, ...] = Q_PATH) -> Any:
    for key in path:
        variables = variables[key]
    return variables


def test_float_matrices_stay_float(written: Path, tmp_path: Path) -> None:
    file = changed(written, tmp_path, tensors={Q: ("F32", floats(256, 256))})
    config, variables = gguf.model(file)
    assert config.precision == (("layers_0/attention/q_proj", "float32"), ("*", "bitnet_b158"))
    np.testing.assert_array_equal(leaf(variables["params"]), floats(256, 256))
    jax.eval_shape(Transformer(config).apply, variables, jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize(
    ("scale", "recipe", "groups"),
    [
        (np.full((256, 2), 0.5), "bitnet_b158", (1, 1)),
        (np.arange(1, 257)[:, None] * np.ones(2), "bitnet_b158_channel", (256, 1)),
        (np.arange(1, 513).reshape(256, 2), "bitnet_b158_group256", (256, 2)),
    ],
)
def test_scales_of_blocks(
    written: Path, tmp_path: Path, scale: Any, recipe: str, groups: tuple[int, int]
) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (256, 512)).astype(np.int8)
    codes[3, :256] = 0  # this block has the scale 0 in the file
    matrix = Ternary(codes, scale.astype(np.float32))
    file = changed(written, tmp_path, tensors={"blk.0.ffn_down.weight": ("TQ2_0", matrix)})
    path = ("layers_0", "mlp", "down_proj", "weight")
    config, variables = gguf.model(file)
    weight = leaf(variables["packed"], path)
    assert config.precisions()["layers_0/mlp/down_proj"] == config_of(recipe)
    assert isinstance(weight, PackedArray)
    assert weight.scale.shape == groups
    np.testing.assert_array_equal(unpack(weight), codes)
    values = codes * np.repeat(scale.astype(np.float32), 256, axis=1)
    np.testing.assert_array_equal(
        codes * np.repeat(np.asarray(weight.scale), 512 // groups[1], axis=1), values
    )

    latent = unpack_model(config, variables)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    mask = jnp.ones((1, 8), bool)
    got, wanted = (logits(config, v, tokens, mask) for v in (latent, variables))
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE)
    gguf_export.write(tmp_path / "again.gguf", config, variables, type="TQ2_0")
    name = "blk.0.ffn_down.weight"
    np.testing.assert_array_equal(
        gguf_file.read(tmp_path / "again.gguf").tensors[name].data, file.tensors[name].data
    )


def config_of(recipe: str) -> Any:
    return ModelConfig(**TINY.to_dict() | {"precision": recipe}).precisions()["layers_0/mlp/down_proj"]


def test_a_scale_tensor_multiplies(written: Path, tmp_path: Path) -> None:
    _, before = gguf.read(written)
    extra = {"blk.0.attn_q.scale": ("F32", np.array([0.5], np.float32))}
    _, after = gguf.model(changed(written, tmp_path, tensors=extra))
    np.testing.assert_array_equal(leaf(after["packed"]).scale, leaf(before["packed"]).scale * 0.5)


def test_i2s_layouts_are_chosen_by_the_caller(written: Path, tmp_path: Path) -> None:
    codes = {
        layout: np.asarray(unpack(leaf(gguf.read(written, i2s_layout=layout)[1]["packed"])))
        for layout in ("128x32", "arm-64x16", "rows4")
    }
    assert len({c.tobytes() for c in codes.values()}) == 3
    with pytest.raises(ValueError, match="m.gguf.*i2s_layout='x'"):
        gguf.read(written, i2s_layout="x")


LLAMA = ModelConfig(
    vocab_size=32, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=96, max_length=16,
    mlp="silu_glu", norm_placement="pre", precision="float32", tie_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_llama_rows_of_q_and_k_are_reordered_both_ways(tmp_path: Path, packed: bool) -> None:
    sizes = {"precision": "bitnet_b158", "hidden_size": 128, "ffn_size": 128} if packed else {}
    config = ModelConfig(**LLAMA.to_dict() | sizes)
    variables = random_variables(config)
    path = tmp_path / "m.gguf"
    gguf_export.write(path, config, variables)
    got_config, got = gguf.read(path)
    assert got_config == config
    file = gguf_file.read(path)
    assert file.metadata["general.architecture"].value == "llama"
    if packed:
        tokens, mask = jnp.arange(8, dtype=jnp.int32)[None], jnp.ones((1, 8), bool)
        np.testing.assert_allclose(
            logits(config, got, tokens, mask), logits(config, variables, tokens, mask), atol=1e-4
        )
        return
    jax.tree.map(np.testing.assert_array_equal, got, variables)
    ours, h = np.asarray(leaf(variables["params"])), 32
    stored = file.tensors[Q].data.view(np.float32).reshape(2, h, 64)
    for i in range(h // 2):  # llama.cpp rotates rows 2 i and 2 i + 1 of a head together
        np.testing.assert_array_equal(stored[:, 2 * i], ours.reshape(2, h, 64)[:, i])
        np.testing.assert_array_equal(stored[:, 2 * i + 1], ours.reshape(2, h, 64)[:, i + h // 2])


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": "qkv"},
        {"attention_bias": "qkvo"},
        {"mlp_bias": True},
        {"use_bias": True},
        {"qk_norm": True, "head_dim": 48},
        {"attention_bias": "qkv", "precision": "bitnet_b158", "hidden_size": 128, "ffn_size": 128},
        {"qk_norm": True, "precision": "bitnet_b158", "hidden_size": 128, "ffn_size": 128},
    ],
)
def test_biases_and_norms_of_q_and_k_return(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = ModelConfig(**LLAMA.to_dict() | changes)
    variables = random_variables(config)
    gguf_export.write(tmp_path / "m.gguf", config, variables)
    again, got = gguf.read(tmp_path / "m.gguf")
    assert again == config
    if config.precision == "float32":
        jax.tree.map(np.testing.assert_array_equal, got, variables)
    tokens, mask = jnp.arange(8, dtype=jnp.int32)[None], jnp.ones((1, 8), bool)
    np.testing.assert_allclose(
        logits(config, got, tokens, mask), logits(config, variables, tokens, mask), atol=1e-4
    )


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_bias", "qwen2_window"])
def test_families_of_hugging_face_return_with_the_same_logits(
    tmp_path: Path, name: str, oracle_folders: Any
) -> None:
    """What transformers computes (fixtures/*.npz), after a way through a GGUF file."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        truth = dict(file)
    config, variables = huggingface.load(oracle_folders(name, truth))
    if "_" in name:  # no architecture of llama.cpp has these
        with pytest.raises(ValueError, match="model.(rope_scaling is|qk_norm=True with biases of q_proj)"):
            gguf_export.write(tmp_path / "m.gguf", config, variables)
        return
    gguf_export.write(tmp_path / "m.gguf", config, variables)
    again, got = gguf.read(tmp_path / "m.gguf")
    architecture = gguf_file.read(tmp_path / "m.gguf").metadata["general.architecture"].value
    assert architecture == name
    tokens = jnp.asarray(truth["input_ids"])
    mask = jnp.ones(tokens.shape, bool)
    whole = logits(again, got, tokens, mask)
    np.testing.assert_allclose(whole, logits(config, variables, tokens, mask), atol=1e-5)
    assert np.abs(np.asarray(whole) - truth["logits"]).max() <= 2e-4  # as test_huggingface_families.py


F1 = ("F32", np.full(256, 0.5, np.float32))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, {Q: None}, r"1 missing \(first blk.0.attn_q.weight\)"),
        ({}, {"blk.9.x": F1}, r"1 unexpected \(first blk.9.x\)"),
        ({}, {"blk.0.attn_q.bias": F1}, "attn_q.bias: biases, and norms of q and k, are not supported"),
        ({}, {"blk.0.attn_q_norm.weight": F1}, "attn_q_norm.weight: biases, and norms"),
        ({}, {"rope_freqs.weight": F1}, "rope_freqs.weight is not 1"),
        (
            {},
            {"output.weight": ("F32", np.ones((32, 256), np.float32))},
            "output.weight differs from token_embd.weight",
        ),
        ({}, {Q: ("F32", floats(128, 256))}, r"shape \[128, 256\], the metadata say \[256, 256\]"),
        ({}, {"token_embd.weight": None}, "no tensor token_embd.weight"),
        ({"bitnet-b1.58.embedding_length": Value("u32", 512)}, {}, "such models are not supported"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    written: Path, tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"changed.gguf: .*{message}"):
        gguf.model(changed(written, tmp_path, metadata, tensors))


def test_an_equal_output_weight_and_neutral_rope_factors_are_passed_over(
    written: Path, tmp_path: Path
) -> None:
    _, variables = gguf.read(written)
    table = np.asarray(leaf(variables["params"], ("embed", "embedding")))
    extra = {"output.weight": ("F32", table), "rope_freqs.weight": ("F32", np.ones(32, np.float32))}
    config, _ = gguf.model(changed(written, tmp_path, tensors=extra))
    assert config.tie_embeddings


def test_nan_is_refused(written: Path, tmp_path: Path) -> None:
    content = bytearray(written.read_bytes())
    norm = gguf_file.read(written).tensors["output_norm.weight"]
    at = len(content) - norm.data.size
    content[at : at + 4] = np.array([np.nan], "<f4").tobytes()
    (tmp_path / "nan.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="nan.gguf: output_norm.weight: got NaN or infinity"):
        gguf.read(tmp_path / "nan.gguf")


def test_mutated_metadata_raise_only_value_errors(tmp_path: Path) -> None:
    """Whatever the container accepts: one line, or a model."""
    path = tmp_path / "m.gguf"
    gguf_export.write(path, LLAMA, random_variables(LLAMA))
    content = path.read_bytes()
    generator, read, refused = np.random.default_rng(2), 0, 0
    structure = content.index(b"output_norm.weight")
    for index in range(300):
        changed = bytearray(content)
        at = int(generator.integers(4, structure))
        if index % 2:
            changed[at] ^= 1 << int(generator.integers(8))
        else:
            changed[at : at + 4] = int(generator.choice([0, 1, 7, 2**31, 2**32 - 1])).to_bytes(4, "little")
        path.write_bytes(changed)
        try:
            gguf.read(path)
            read += 1
        except ValueError as error:
            refused += str(error).isprintable() and len(str(error)) < 1500
    assert read > 10
    assert refused > 100
    assert read + refused == 300


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("isa", cpu.available_isas())
def test_packed_models_under_each_instruction_set(
    oracles: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last in the file, for it empties the compilation caches: the variable is read at tracing time."""
    jax.clear_caches()
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    folder = oracles / "gguf" / "model_tiny"
    for type_name in TYPES:
        check(*loaded(folder / f"model.{type_name}.gguf"), oracle(folder))


@pytest.fixture(scope="module", autouse=True)
def no_trace_of_a_forced_instruction_set() -> Iterator[None]:
    yield
    jax.clear_caches()
