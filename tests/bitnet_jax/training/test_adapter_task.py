"""Adapters on a frozen packed model: gradients, training, files, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bitnet_jax.cli.main import main
from bitnet_jax.data.tokenizers import ByteTokenizer
from bitnet_jax.model_folders import load_text_model, save_model, with_adapter_files
from bitnet_jax.models import ModelConfig, Transformer, init_variables
from bitnet_jax.nn.adapter import COLLECTION
from bitnet_jax.packed import adapters, packing, storage
from bitnet_jax.packed.adapters import fingerprint, load_adapter, save_adapter, with_adapters
from bitnet_jax.packed.tensor_file import StorageError
from bitnet_jax.training.adapter_task import adapted, new_adapter
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.config_sections import AdapterConfig
from bitnet_jax.training.load import read_adapter, read_run
from bitnet_jax.training.loop import fit
from bitnet_jax.training.task import language_loss

TEXT = "the quick brown fox jumps over the lazy dog\n" * 40
MODEL = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    ffn_size=64,
    max_length=32,
    precision="bitnet_b158",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "text.txt").write_text(TEXT)
    latent = init_variables(MODEL, jax.random.key(0))
    storage.save_packed(folder / "packed", packing.pack(latent["params"], MODEL), MODEL, ByteTokenizer())
    return folder / "packed"


def settings(base: Path, **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "init": str(base),
        "adapter": {"rank": 4},
        "model": {},
        "data": {"source": str(base.parent / "text.txt"), "split": "tail", "valid_fraction": 0.2, "length": 16,
                 "batch_size": 4},
        "optimizer": {"learning_rate": 0.02, "schedule": "constant", "weight_decay": 0.0},
        "training": {"steps": 40, "eval_every": 20, "checkpoint_every": 20, "statistics_every": 0},
    }  # fmt: skip
    return RunConfig.from_dict(fields | changes)


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    fit(settings(base), base.parent / "run", progress=False)
    return base.parent / "run"


def logits(variables: Any, tokens: Any) -> np.ndarray:
    return np.asarray(jax.jit(Transformer(MODEL).apply)(variables, tokens).logits)


TOKENS = jax.random.randint(jax.random.key(3), (2, 12), 0, 256)


def test_gradients_through_packed_weights_are_those_through_latent_ones() -> None:
    latent = init_variables(MODEL, jax.random.key(0))
    packed = packing.pack(latent["params"], MODEL)
    config, loss = AdapterConfig(rank=2, layers=["*"]), language_loss(Transformer(MODEL))
    params = jax.tree.map(lambda x: x + 0.05, new_adapter(config, MODEL, jax.random.key(1)))
    batch = {"inputs": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}

    def of(base: Any) -> Any:
        return jax.jit(
            jax.grad(lambda params: loss(adapted(base, params, config), batch, None, 1.0)[0].loss)
        )(params)

    ours, theirs = flatten_dict(of(packed), sep="/"), flatten_dict(of(latent), sep="/")
    for path, value in theirs.items():
        assert np.any(value != 0), path
        np.testing.assert_allclose(
            ours[path], value, rtol=1e-3, atol=1e-4 * float(np.abs(value).max()), err_msg=path
        )


def test_the_model_is_unchanged_at_the_start() -> None:
    packed = packing.pack(init_variables(MODEL, jax.random.key(0))["params"], MODEL)
    config = AdapterConfig(rank=2)
    start = adapted(packed, new_adapter(config, MODEL, jax.random.key(1)), config)
    np.testing.assert_array_equal(logits(start, TOKENS), logits(packed, TOKENS))


def test_training_lowers_the_loss_keeps_the_model_and_resumes(base: Path, run: Path, tmp_path: Path) -> None:
    before = fingerprint(base), (base / storage.MODEL).read_bytes()
    whole = fit(settings(base), run, progress=False)  # complete: its result
    untrained = fit(settings(base, training={"steps": 1, "eval_every": 1, "statistics_every": 0}), tmp_path / "one",
                    progress=False)  # fmt: skip
    assert whole["valid"]["loss"] < untrained["valid"]["loss"] - 0.15
    assert set(read_run(run).variables) == {"params", "packed", COLLECTION}
    assert (fingerprint(base), (base / storage.MODEL).read_bytes()) == before
    assert whole["parameters"] == sum(4 * (n + k) for n, k in adapters.layer_shapes(MODEL).values())

    halves = settings(base, training=settings(base).to_dict()["training"] | {"steps": 20})
    fit(halves, tmp_path / "halves", progress=False)
    again = fit(settings(base), tmp_path / "halves", progress=False)
    assert again["valid"] == whole["valid"]


def test_the_packed_model_with_the_file_is_the_model_of_the_run(
    base: Path, run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ours.safetensors"
    assert main(["adapter", str(run), str(file)]) == 0
    model = load_text_model(base)
    beside = with_adapter_files(model, base, [str(file)])
    np.testing.assert_array_equal(logits(beside.variables, TOKENS), logits(read_run(run).variables, TOKENS))
    assert np.any(logits(beside.variables, TOKENS) != logits(model.variables, TOKENS))
    halves = with_adapter_files(model, base, [f"{file}:0.5", f"{file}:0.5"])
    np.testing.assert_allclose(
        logits(halves.variables, TOKENS), logits(beside.variables, TOKENS), rtol=1e-4, atol=1e-4
    )
    without = with_adapters(beside.variables, [])
    np.testing.assert_array_equal(logits(without, TOKENS), logits(model.variables, TOKENS))
    with pytest.raises(StorageError, match="exists"):
        save_adapter(file, read_adapter(run))


def test_only_the_named_layers_are_adapted(base: Path) -> None:
    settings = AdapterConfig(rank=2, layers=["*/attention/*", "layers_1/mlp/up_proj"])
    found = flatten_dict(new_adapter(settings, MODEL, jax.random.key(0)), sep="/")
    paths = {path[:-2] for path in found}
    assert paths == {f"layers_{i}/attention/{n}_proj" for i in (0, 1) for n in "qkvo"} | {
        "layers_1/mlp/up_proj"
    }
    with pytest.raises(ValueError, match="adapter.layers: got '\\*/missing', which matches none"):
        new_adapter(dataclasses.replace(settings, layers=["*/missing"]), MODEL, jax.random.key(0))


def test_an_adapter_fits_only_the_model_that_it_was_trained_with(
    base: Path, run: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(run)
    save_adapter(tmp_path / "a.safetensors", adapter)
    other = init_variables(MODEL, jax.random.key(9))
    storage.save_packed(tmp_path / "other", packing.pack(other["params"], MODEL), MODEL, ByteTokenizer())
    with pytest.raises(
        StorageError, match="got the adapter of the model .* use the model that it was trained with"
    ):
        load_adapter(tmp_path / "a.safetensors", tmp_path / "other", MODEL)
    with pytest.raises(ValueError, match="a run model, expected the packed model"):
        with_adapter_files(load_text_model(run), run, ["a.safetensors"])
    moved = settings(base).to_dict() | {"init": str(tmp_path / "other")}
    moved["adapter"] |= {"base": adapter.base}
    with pytest.raises(ValueError, match="with which the adapter was begun; restore it"):
        fit(moved, tmp_path / "moved", progress=False)
    assert not (tmp_path / "moved").exists()


def test_damaged_files_are_refused(base: Path, run: Path, tmp_path: Path) -> None:
    adapter, file = read_adapter(run), tmp_path / "a.safetensors"
    save_adapter(file, adapter)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(StorageError, match="does not have its checksum"):
        load_adapter(file, base, MODEL)
    name = next(iter(adapter.layers))
    a, b = adapter.layers[name]
    nan = np.full_like(a, jnp.nan)
    wrong: dict[str, Any] = {
        "tensors that are not those": {"layers_9/attention/q_proj": (a, b)},
        r"expected bfloat16 \[r, 32\]": {name: (a[:, 1:], b)},
        "expected bfloat16": {name: (a.astype(np.float32), b)},
        "NaN or infinity": {name: (nan, b)},
    }
    for message, layers in wrong.items():
        save_adapter(file, adapter._replace(layers=layers), overwrite=True)
        with pytest.raises(StorageError, match=message):
            load_adapter(file, base, MODEL)
    save_adapter(file, adapter._replace(scale=float("nan")), overwrite=True)
    with pytest.raises(StorageError, match="got scale 'nan'"):
        load_adapter(file, base, MODEL)
    with pytest.raises(StorageError, match=r"expected 'bitnet_jax.adapter'"):
        load_adapter(base / storage.MODEL, base, MODEL)


def test_no_format_holds_a_model_with_an_adapter(run: Path, tmp_path: Path) -> None:
    for target in ("packed", "huggingface", "gguf"):
        with pytest.raises(ValueError, match="got a model with an adapter"):
            save_model(tmp_path / "x", load_text_model(run), target)
    assert main(["pack", str(run), str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": None, "model": MODEL.to_dict()}, "adapter.rank: got 4 for task 'language' with init None"),
        ({"mesh": {"data": 2}}, "a mesh of one device"),
        ({"adapter": {"rank": 0}}, "adapter.rank: got 0"),
        ({"adapter": {"rank": 4, "alpha": 0.0}}, "adapter.alpha: got 0.0"),
        ({"adapter": {"rank": 4, "layers": []}}, "adapter.layers: got none"),
        (
            {"model": {"precision": "int8"}},
            "model.precision: got 'int8' with an adapter, expected 'bitnet_b158'",
        ),
        ({"data": {"tokenizer": "char"}}, "data.tokenizer: got 'char' beside init"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    base: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(settings(base, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_inputs_without_a_gradient_are_refused(base: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(MODEL, precision="bit")
    latent = init_variables(config, jax.random.key(0))
    storage.save_packed(tmp_path / "bit", packing.pack(latent["params"], config), config, ByteTokenizer())
    with pytest.raises(ValueError, match="through which a packed matrix passes no gradient"):
        fit(settings(base, init=str(tmp_path / "bit")), tmp_path / "run", progress=False)
