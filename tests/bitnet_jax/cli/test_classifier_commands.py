"""Classifiers on the command line: train, pack, info, eval and predict, for images and texts."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.data.image_files import read_images
from bitnet_jax.data.images import drawn_digits, load_images, shrink
from bitnet_jax.model_folders import load_model
from bitnet_jax.models import init_variables, model_config
from bitnet_jax.packed import packing, storage
from bitnet_jax.packed.proof import prove
from bitnet_jax.tools.pack_model import pack_model
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.loop import fit

pytestmark = pytest.mark.extended

MODELS: dict[str, dict[str, Any]] = {
    "mlp": dict(image_size=8, num_classes=10, hidden_size=16, num_layers=2, precision="bnn"),
    "cnn": dict(image_size=8, num_classes=10, widths=[4, 8], precision="xnor"),
    "vision_transformer": dict(
        image_size=8, num_classes=10, patch_size=4, hidden_size=8, ffn_size=8, num_layers=2, num_heads=2,
        mlp="relu", attention="binary", precision="bit_relu",
    ),
    "transformer": dict(
        vocab_size=256, num_classes=2, causal=False, hidden_size=8, num_layers=1, num_heads=2, ffn_size=8,
        max_length=12, mlp="relu", precision="bitnet_b158",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `images` and `texts`, `images-packed` and `texts-packed`, digits.npy and its labels."""
    place = tmp_path_factory.mktemp("classifiers")
    sections = dict(
        training=dict(steps=2, eval_every=2, checkpoint_every=2, log_every=2),
        evaluation=dict(batches=None, batch_size=250),
    )
    images = dict(
        task="images",
        model=dict(architecture="mlp", **MODELS["mlp"]),
        data=dict(source="drawn", image_size=8, limit=200, batch_size=8),
    )
    words = [("good", 1), ("bad", 0)]
    lines = [json.dumps({"text": f"{words[i % 2][0]} film {i}", "label": words[i % 2][1]}) for i in range(60)]
    (place / "texts.jsonl").write_text("\n".join(lines))
    texts = dict(
        task="text_classification",
        model={k: v for k, v in MODELS["transformer"].items() if k != "max_length"},
        data=dict(source=str(place / "texts.jsonl"), length=12, batch_size=8, valid_fraction=0.3),
    )
    for name, fields in (("images", images), ("texts", texts)):
        fit(RunConfig.from_dict(fields | sections), place / name, progress=False)
        assert cli.main(["pack", f"{place}/{name}", f"{place}/{name}-packed"]) == 0
    digits = drawn_digits(5, seed=7)
    np.save(place / "digits.npy", np.rint(digits.images).astype(np.uint8))
    np.save(place / "labels.npy", digits.labels)
    return place


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow(after=2)
@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_round_trips_through_pack_save_and_load(architecture: str, tmp_path: Path) -> None:
    config = model_config({"architecture": architecture} | MODELS[architecture])
    latent = jax.jit(init_variables, static_argnums=0)(config, jax.random.key(1))
    if "batch_stats" in latent:  # not the initial values, which would hide a packed folder that drops them
        latent["batch_stats"] = jax.tree.map(lambda x: x + 0.5, latent["batch_stats"])
    storage.save_packed(tmp_path / "p", latent | packing.pack(latent["params"], config), config)
    loaded = storage.load_packed(tmp_path / "p", verify=True)
    assert loaded.config == config
    inputs = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    if architecture == "transformer":
        inputs = np.arange(24).reshape(2, 12)
    proof = prove(config, latent, loaded.variables, inputs)
    assert proof.matrices == len(config.packed_formats()) > 0
    assert proof.max_relative_logit_error <= 1e-5
    config.module().apply(loaded.variables, inputs)


def test_pack_keeps_statistics_labels_and_normalization(place: Path) -> None:
    run, packed = load_model(place / "images"), load_model(place / "images-packed")
    assert packed.kind == "packed"
    assert packed.config == run.config
    assert packed.classes == run.classes is not None
    assert packed.classes.pixels == load_images("drawn", size=8, limit=200).pixels
    jax.tree.map(np.testing.assert_array_equal, packed.variables["batch_stats"], run.variables["batch_stats"])
    texts = load_model(place / "texts-packed").classes
    assert texts is not None
    assert (texts.names, texts.length) == ((0, 1), 12)


@pytest.mark.parametrize(("name", "examples"), [("images", 1000), ("texts", 17)])
def test_eval_matches_the_held_out_metrics_of_training_and_adds_an_interval(
    place: Path, name: str, examples: int
) -> None:
    figures = []
    for folder in (name, f"{name}-packed"):
        assert cli.main(["eval", f"{place}/{folder}", "--json", f"{place}/eval.json"]) == 0
        figures.append({key: value for key, value in read(place / "eval.json").items() if key != "seconds"})
    assert figures[0] == figures[1]
    trained = read(place / name / "result.json")["valid"]
    accuracy = figures[0]["metrics"]["accuracy"]
    assert abs(figures[0]["examples"] - examples) <= (0 if name == "images" else 8)  # held out by hash
    assert accuracy["value"] == pytest.approx(trained["accuracy"])
    assert accuracy["interval_95"][0] < accuracy["value"] < accuracy["interval_95"][1]
    assert figures[0]["details"]["loss"] == pytest.approx(trained["loss"], rel=1e-5)


def test_eval_on_another_text_source(place: Path, tmp_path: Path) -> None:
    source = tmp_path / "other.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"bad {i}", "label": i % 2}) for i in range(10)))
    arguments = ["eval", f"{place}/texts-packed", "--source", str(source), "--split", "all", "--json"]
    assert cli.main([*arguments, f"{tmp_path}/e.json"]) == 0
    assert read(tmp_path / "e.json")["examples"] == 10
    assert cli.main([*arguments, f"{tmp_path}/e.json", "--limit", "4"]) == 0
    assert read(tmp_path / "e.json")["examples"] == 4


def test_predictions_agree_for_a_run_its_packed_model_and_a_direct_call(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for folder in ("images", "images-packed"):
        words = [f"{place}/{folder}", f"{place}/digits.npy", "--format", "jsonl", "--json", f"{place}/p.json"]
        assert cli.main(["predict", *words]) == 0
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
        assert read(place / "p.json") == {"classes": list(range(10)), "predictions": answers[-1]}
    assert [row["label"] for row in answers[0]] == [row["label"] for row in answers[1]]

    model = load_model(place / "images")
    assert model.classes is not None
    mean, deviation, _ = model.classes.pixels
    inputs = (shrink(np.load(place / "digits.npy").astype(np.float32), 8) - mean) / deviation
    expected = jax.nn.softmax(
        jax.jit(model.config.module().apply)(model.variables, inputs.astype("float32")).logits
    )
    got = [list(row["probabilities"].values()) for row in answers[0]]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)  # two compilations of one float32 softmax
    assert [row["label"] for row in answers[0]] == np.argmax(expected, axis=-1).tolist()


def test_every_image_file_format_gives_the_same_prediction(place: Path, tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    images = np.load(place / "digits.npy")
    np.savez(tmp_path / "d.npz", images=images[..., 0])
    np.save(tmp_path / "one.npy", images[0, ..., 0].astype(np.float64))
    idx = bytes((0, 0, 8, 3)) + struct.pack(">3I", *images.shape[:3]) + images.tobytes()
    (tmp_path / "d-images-idx3-ubyte").write_bytes(idx)
    (tmp_path / "d.gz").write_bytes(gzip.compress(idx))
    for name in ("d.png", "d.pgm"):
        image_module.fromarray(images[0, ..., 0]).save(tmp_path / name)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_images(path, 1)[0], images[0], err_msg=path.name)
    assert read_images(tmp_path / "d.gz", 1).shape == images.shape


def test_predict_reads_texts_from_arguments_a_file_and_stdin(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["good film", "bad film", "good é film that is longer than twelve tokens"]
    (place / "lines.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")

    class Stdin:
        buffer = (place / "lines.txt").open("rb")

    model = f"{place}/texts-packed"
    assert cli.main(["predict", model, texts[0], "--batch-size", "2", *texts[1:]]) == 0
    given = capsys.readouterr()
    assert "cut to its first 12 of 46 tokens, as in training" in given.err
    rows = [line.split("\t") for line in given.out.splitlines()]
    assert [row[2] for row in rows] == texts
    assert all(row[0] in "01" and 0.5 <= float(row[1]) <= 1 for row in rows)
    assert cli.main(["predict", model, "--file", f"{place}/lines.txt"]) == 0
    assert capsys.readouterr().out == given.out
    with monkeypatch.context() as patch, Stdin.buffer:
        patch.setattr("sys.stdin", Stdin)
        assert cli.main(["predict", model]) == 0
    assert capsys.readouterr().out == given.out


def test_info_shows_the_classes_and_the_architecture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("images", "images-packed", "texts", "texts-packed"):
        assert cli.main(["info", f"{place}/{folder}", "--json", f"{place}/info.json"]) == 0
        figures, out = read(place / "info.json"), capsys.readouterr().out
        images = folder.startswith("images")
        assert figures["config"]["architecture"] == ("mlp" if images else "transformer")
        assert figures["classes"]["names"] == (list(range(10)) if images else [0, 1])
        assert ("pixels: mean" in out) == images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{place}/images-packed", "{place}/fractions.npy"], "multiply by 255"),
        (["predict", "{place}/images-packed", "{place}/large.npy"], "30 x 30 pixels, expected 16 x 16"),
        (["predict", "{place}/images-packed", "{place}/colour.npy"], "expected images of 1 channels"),
        (["predict", "{place}/images-packed", "{place}/pickled.npy"], "a file that NumPy cannot read"),
        (["predict", "{place}/images-packed", "{place}/negative.npy"], "values from -1 to 0"),
        (["predict", "{place}/images-packed", "{place}/empty.png"], "a file that Pillow cannot read"),
        (["predict", "{place}/images-packed", "/dev/zero"], "no such file"),
        (["predict", "{place}/images-packed", "{place}"], "no such file"),
        (["predict", "{place}/texts-packed", ""], "at least one token"),
        (["predict", "{place}/texts-packed", "a", "--file", "{place}/lines.txt"], "expected only one of them"),
        (["predict", "{place}/texts-packed", "--file", "{place}/latin.txt"], "latin.txt:1: got bytes"),
        (["predict", "{place}/texts-packed", "a", "--batch-size", "0"], "expected at least 1"),
        (["generate", "{place}/images-packed", "--prompt", "a"], "got an image model (mlp)"),
        (["energy", "{place}/images-packed"], "got an image model (mlp)"),
        (["eval", "{place}/images-packed", "--tasks", "language"], "got an image model (mlp)"),
        (["eval", "{place}/images-packed", "--split", "all"], "expected none"),
        (["eval", "{place}/texts-packed", "--tasks", "nothing"], "--tasks: got 'nothing', expected one of language"),
        (["pack", "{place}/images", "{place}/again", "--head", "int8"], "got an image model (mlp)"),
        (["pack", "{place}/images", "{place}/images-packed"], "expected a new folder, or --overwrite"),
        (["pack", "{place}/images", "{place}/texts.jsonl/x"], "Not a directory"),
        (["pack", "{place}/images", "{place}/texts", "--overwrite"], "not a packed model and will not be overwritten"),
        (["pack", "{place}/images-packed", "{place}/again"], "a packed model whose weights are packed"),
        (["pack", "{place}/nowhere", "{place}/again"], "there is no such folder"),
        (["pack", "{place}/images", "{place}/again", "--json", "{place}"], "which is a folder"),
    ],
)  # fmt: skip
def test_invalid_input_is_a_one_line_error_before_any_work(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(place / "fractions.npy", np.full((16, 16), 0.5))
    np.save(place / "large.npy", np.zeros((30, 30), np.uint8))
    np.save(place / "colour.npy", np.zeros((16, 16, 3), np.uint8))
    np.save(place / "pickled.npy", np.array([{}], object))
    np.save(place / "negative.npy", np.full((16, 16), -1) * np.eye(16, dtype=int))
    (place / "empty.png").write_bytes(b"")
    (place / "latin.txt").write_bytes(b"\xe9\n")
    assert cli.main([word.format(place=place) for word in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert message in error[-1]
    assert not (place / "again").exists()


def test_pack_rejects_its_target_before_it_reads_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("the run was read before the target was looked at")

    monkeypatch.setattr("bitnet_jax.training.load.read_run", never)
    (tmp_path / "there").mkdir()
    with pytest.raises(storage.StorageError, match="exists; choose another folder or pass overwrite=True"):
        pack_model(place / "images", tmp_path / "there")


def test_a_packed_model_is_not_packed_again(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packed model whose weights are packed, expected latent weights"):
        pack_model(place / "images-packed", tmp_path / "packed")
