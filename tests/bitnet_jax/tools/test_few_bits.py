"""Few bits without training: what is written, resumed and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bitnet_jax.cli import main as cli
from bitnet_jax.conversion import blocks
from bitnet_jax.conversion.calibration import Stream, embedded, windows
from bitnet_jax.conversion.grids import GRIDS
from bitnet_jax.data import ByteTokenizer
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.model_folders import LoadedModel, load_text_model
from bitnet_jax.models import init_variables
from bitnet_jax.nn.linear import BitLinear
from bitnet_jax.packed.latent import unpack_model
from bitnet_jax.packed.proof import logits
from bitnet_jax.packed.storage import StorageError
from bitnet_jax.tools import few_bits as tool
from bitnet_jax.tools.few_bits import few_bits
from tests.bitnet_jax.tools.float_models import CONFIG, TEXT, saved


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are compared, no tokens generated: the tests of pack_model do that."""
    monkeypatch.setattr(tool, "PROOF_TOKENS", 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text(TEXT)
    saved(folder / "float")
    return folder


def convert(source: Path, target: Path, **options: Any) -> tool.Converted:
    return few_bits(source / "float", target, progress=False, **options)


def calibrated(source: Path, **options: Any) -> dict[str, Any]:
    return {"calibration": str(source / "text.txt"), "count": 40} | options


def kl(source: Path, target: Path) -> float:
    """KL(float || converted) of a text that is not in the calibration text."""
    tokens = jnp.asarray(
        np.frombuffer(b"binary weights have two values. " * 4, np.uint8).reshape(4, 32).astype(np.int32)
    )
    both = [load_text_model(path) for path in (source / "float", target)]
    p, q = (jax.nn.log_softmax(logits(m.config.module(), m.variables, tokens)) for m in both)
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


@pytest.mark.extended(after=2)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_packed_and_equals_its_latent_weights(source: Path, tmp_path: Path, grid: str) -> None:
    done = convert(source, tmp_path / "new", grid=grid, granularity=32, activation="int8")
    assert done.proof.matrices == 14
    model = load_text_model(tmp_path / "new")
    assert set(model.config.packed_formats().values()) == {done.settings.precision.packed_format}
    latent = flatten_dict(unpack_model(model.config, model.variables)["params"], sep="/")
    float_weights = flatten_dict(load_text_model(source / "float").variables["params"], sep="/")
    for path, report in done.layers.items():
        w, q = (np.asarray(flat[f"{path}/weight"]) for flat in (float_weights, latent))
        assert report.error == pytest.approx(np.sum((w - q) ** 2) / np.sum(w**2), rel=1e-4)
    assert not (tmp_path / "new.parts").exists()


@pytest.mark.extended
def test_calibration_helps(source: Path, tmp_path: Path) -> None:
    arms = {"fit": {}, "weighted": calibrated(source, method="weighted"), "gptq": calibrated(source)}
    for name, options in arms.items():
        convert(source, tmp_path / name, **options)
    found = {name: kl(source, tmp_path / name) for name in arms}
    assert found["gptq"] < found["weighted"] < found["fit"]


@pytest.mark.extended
def test_rotated_weights_meet_rotated_inputs(source: Path, tmp_path: Path) -> None:
    """With 4 bits hardly anything is lost; rotated only on one side, the model would be another."""
    convert(source, tmp_path / "rotated", grid="4", rotate=True)
    convert(source, tmp_path / "ternary")
    assert kl(source, tmp_path / "rotated") < 0.1 * kl(source, tmp_path / "ternary")


@pytest.mark.extended
@pytest.mark.parametrize(
    "changes", [{}, {"norm_placement": "post", "norm": "layernorm", "norm_bias": True, "position": "learned"}]
)
def test_inputs_are_those_of_the_packed_model(source: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    saved(tmp_path / "float", dataclasses.replace(CONFIG, **changes))
    done = convert(tmp_path, tmp_path / "new", **calibrated(source))
    model = load_text_model(tmp_path / "new")
    tokens = windows([ByteTokenizer().encode(TEXT)], 32, 40)
    seen: dict[str, np.ndarray] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, BitLinear) and context.method_name == "__call__":
            seen["/".join(context.module.path)] = np.asarray(args[0]).reshape(-1, args[0].shape[-1])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.config.module().apply(model.variables, jnp.asarray(tokens))
    blocks_of = [
        {
            path.removeprefix(f"layers_{i}/"): np.asarray(leaf)
            for path, leaf in latent.items()
            if path.startswith(f"layers_{i}/")
        }
        for latent in [flatten_dict(unpack_model(model.config, model.variables)["params"], sep="/")]
        for i in range(2)
    ]
    stream = Stream(model.config, embedded(model.config, model.variables["params"], tokens))
    for i, flat in enumerate(blocks_of):
        weights = {path.removesuffix("/weight"): w for path, w in flat.items() if path.endswith("/weight")}
        others = unflatten_dict({path: leaf for path, leaf in flat.items() if "weight" not in path}, sep="/")
        for path in weights:
            x = seen[f"layers_{i}/{path}"]
            np.testing.assert_allclose(
                stream.moment(i, others, weights, path),
                x.T @ x / len(x),
                rtol=2e-3,
                atol=1e-4 * np.mean(x**2),
            )
        stream.advance(i, others, weights)
    assert done.calibration_tokens == tokens.size


def test_an_interrupted_conversion_continues_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = calibrated(source)
    convert(source, tmp_path / "whole", **options)

    def interrupted(config: Any, params: Any, layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return blocks.convert_block(config, params, layer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(tool, "convert_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.parts", "whole"]
    with pytest.raises(
        ValueError, match=r"new.parts: got blocks of an interrupted conversion with settings .*remove it"
    ):
        convert(source, tmp_path / "new", grid="binary", **options)
    with pytest.raises(ValueError, match="with embedding float32, expected int8"):
        convert(source, tmp_path / "new", embedding="int8", **options)
    assert convert(source, tmp_path / "new", **options).resumed == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "whole"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_block_is_converted_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Any:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(tool, "prove_and_save", failing)
        with pytest.raises(OSError, match="disk full"):
            convert(source, tmp_path / "new")
    file = tmp_path / "new.parts" / "layers_0.npz"
    file.write_bytes(file.read_bytes()[:100])
    done = convert(source, tmp_path / "new")
    assert done.resumed == 1
    assert {path.split("/")[0] for path in done.layers} == {"layers_0"}


@pytest.mark.extended
def test_the_embedding_can_have_few_bits_too(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "new", embedding="int8")
    assert load_text_model(tmp_path / "new").variables["packed"]["embed"]["weight"].format == "int8"


def test_what_cannot_be_converted_is_refused_in_one_line(source: Path, tmp_path: Path) -> None:
    def refused(message: str, folder: Path = source / "float", **options: Any) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            few_bits(folder, tmp_path / "new", progress=False, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()

    (tmp_path / "short.txt").write_text("too short")
    refused(
        "calibration text of 11 tokens, expected at least one window of 32",
        calibration=str(tmp_path / "short.txt"),
    )
    refused("got the method gptq without calibration text", method="gptq")
    refused("method fit with calibration text", **calibrated(source, method="fit"))
    refused("granularity=48", granularity=48)
    convert(source, tmp_path / "ternary")
    refused("a quantized packed model, expected a float model", tmp_path / "ternary")
    classifier = saved(tmp_path / "classes", dataclasses.replace(CONFIG, num_classes=3))
    refused("a classifier or a bidirectional model", classifier)
    inside = saved(tmp_path / "inside", dataclasses.replace(CONFIG, norm_placement="inside"))
    refused("norm inside its linear layers", inside)
    few = saved(tmp_path / "few", dataclasses.replace(CONFIG, vocab_size=100))
    refused("calibration text: got the token .* expected ids below 100", few, **calibrated(source))
    loud = saved(tmp_path / "loud", embed__embedding=100 * jax.random.normal(jax.random.key(5), (257, 32)))
    refused(
        "nats a token from the float model.*do tokenizer and weights belong together",
        loud,
        **calibrated(source),
    )
    shape = {"layers_1__mlp__up_proj__weight": jnp.zeros((64, 32))}
    refused("layers_1/mlp/up_proj: every code became 0", saved(tmp_path / "zeros", **shape))
    assert (tmp_path / "new.parts").exists()  # the first block is done


def test_not_finite_weights_and_inputs_are_named(source: Path, tmp_path: Path) -> None:
    weight = jax.random.normal(jax.random.key(2), (64, 32)).at[3, 4].set(jnp.nan)
    bad = LoadedModel(
        "run", CONFIG, init_variables(CONFIG, jax.random.key(0)), ByteTokenizer(), None, Conversation()
    )
    params = flatten_dict(bad.variables["params"], sep="/")
    block = {
        path.removeprefix("layers_0/"): leaf for path, leaf in params.items() if path.startswith("layers_0/")
    }
    settings = blocks.Settings(granularity=32, method="gptq")
    config = dataclasses.replace(CONFIG, precision=settings.precision)
    x = np.ones((1, 32, 32), np.float32)
    of = unflatten_dict(block | {"mlp/up_proj/weight": weight}, sep="/")
    with pytest.raises(ValueError, match="layers_0/mlp/up_proj: got weights with NaN"):
        blocks.convert_block(config, of, 0, settings, Stream(config, x))
    x[0, 3] = np.inf
    with pytest.raises(ValueError, match="layers_0/attention/q_proj: got NaN or infinite inputs"):
        blocks.convert_block(config, unflatten_dict(block, sep="/"), 0, settings, Stream(config, x))


@pytest.mark.extended
def test_an_existing_target_is_kept(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "new")
    with pytest.raises(StorageError, match="exists"):
        convert(source, tmp_path / "new")
    assert convert(source, tmp_path / "new", grid="binary", overwrite=True).settings.grid == "binary"


@pytest.mark.extended
def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, report = tmp_path / "new", tmp_path / "figures.json"
    options = [
        "--bits",
        "2",
        "--calibration",
        str(source / "text.txt"),
        "--granularity",
        "channel",
        "--json",
        str(report),
    ]
    assert cli.main(["convert", str(source / "float"), str(target), *options]) == 0
    figures = json.loads(report.read_text())
    assert figures["settings"]["grid"] == "2"
    assert figures["settings"]["granularity"] == "channel"
    assert len(figures["layers"]) == figures["proof"]["matrices"] == 14
    assert "2-bit weights by gptq" in capsys.readouterr().out
    for wrong in (["--ternarize", "--to", "gguf"], ["--calibration", "x"], ["--rotate"]):
        assert cli.main(["convert", str(source / "float"), str(tmp_path / "b"), *wrong]) == 2
        assert "expected none; leave it out" in capsys.readouterr().err
