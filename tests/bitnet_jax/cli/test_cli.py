"""The CLI end to end: output, files and exit codes. All tests share one tiny run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.data.tokenizers import CharTokenizer
from bitnet_jax.inference.generation import generate
from bitnet_jax.model_folders import load_model
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import huge_pages, packing, storage

pytestmark = pytest.mark.extended


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_train_prints_the_result_of_the_run(place: Path) -> None:
    assert read(place / "train.json") == read(place / "run" / "result.json")
    assert read(place / "train.json")["status"] == "finished"
    assert read(place / "train.json")["step"] == 2


def test_a_finished_run_is_extended_or_overwritten(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--config", f"{place}/config.py", "--workdir", f"{tmp_path}/run", "--quiet"]
    typo = [*train, "--config.data.source=nowhere"]
    assert cli.main(typo) == 2
    assert cli.main([*train, "--config.training.steps=1"]) == 0, "a typo leaves no files to clean up"
    capsys.readouterr()
    assert cli.main([*train, "--config.training.steps=2"]) == 0
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert (
        "1 before, 2 now; resuming from step 1, with schedule='cosine' computed for 2 from here on"
        in told.err
    )
    assert read(tmp_path / "run" / "result.json")["extended_from"] == [1]
    assert told.out.splitlines()[1].split() == ["status", "finished", "at", "step", "2", "of", "2"]
    assert max(map(len, told.out.splitlines())) <= 80
    assert cli.main([*train, "--config.training.steps=1"]) == 2
    assert "got 1, expected at least the 2" in capsys.readouterr().err
    assert cli.main([*typo, "--overwrite"]) == 2
    assert read(tmp_path / "run" / "result.json")["step"] == 2, "what cannot be replaced is kept"
    assert cli.main([*train, "--config.training.steps=1", "--config.seed=1", "--overwrite"]) == 0
    assert read(tmp_path / "run" / "result.json")["step"] == 1


def test_variant_and_overrides_reach_the_run(place: Path) -> None:
    config = read(place / "run" / "config.json")
    assert (config["training"]["steps"], config["model"]["ffn_size"]) == (2, 48)
    assert config["model"]["precision"] == "bitnet_b158"


def test_pack_writes_a_proven_model(place: Path) -> None:
    figures = read(place / "pack.json")
    assert figures["proof"]["matrices"] == 7
    assert figures["proof"]["tokens_identical"] >= 40
    assert figures["bytes"]["packed"] < figures["bytes"]["quantized_bfloat16"] / 4
    assert load_model(place / "packed").kind == "packed"


def test_pack_writes_nothing_when_the_proof_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = packing.pack

    def flipped(params: dict, config: object) -> dict:
        """Flips one sign of one packed matrix: the smallest possible change to the model."""
        variables = pack(params, config)
        weight = variables["packed"]["layers_0"]["mlp"]["up_proj"]["weight"]
        codes = weight.codes.at[0, 0, 0].set(weight.codes[0, 0, 0] ^ 2)
        variables["packed"]["layers_0"]["mlp"]["up_proj"]["weight"] = type(weight)(
            codes, weight.scale, weight.format, weight.layout, weight.shape
        )
        return variables

    monkeypatch.setattr(packing, "pack", flipped)
    assert cli.main(["pack", f"{place}/run", f"{tmp_path}/packed", "--tokens", "0"]) == 2
    assert "layers_0/mlp/up_proj" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pack_stores_the_requested_head_and_info_shows_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pack", f"{place}/run", f"{tmp_path}/p", "--tokens", "40", "--head", "int8"]) == 0
    model = load_model(tmp_path / "p")
    assert model.config.head == "int8"
    assert model.variables["packed"]["lm_head"]["weight"].format == "int8"
    assert "packed equals latent: 8 matrices" in capsys.readouterr().out
    assert cli.main(["info", f"{tmp_path}/p"]) == 0
    assert "lm_head " in capsys.readouterr().out


def test_generate_with_an_exact_head_gives_the_same_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config, variables, tokenizer, *_ = load_model(place / "packed")
    variables["params"]["embed"]["embedding"] = variables["params"]["embed"]["embedding"].astype("bfloat16")
    config = dataclasses.replace(config, embedding_dtype="bfloat16")
    storage.save_packed(tmp_path / "p", variables, config, tokenizer)
    words = ["--prompt", "A tiny", "--tokens", "9", "--temperature", "1", "--top-k", "5"]
    texts = []
    for more in ([], ["--exact-head"]):
        assert cli.main(["generate", f"{tmp_path}/p", *words, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"
    assert cli.main(["generate", f"{place}/packed", *words, "--exact-head"]) == 2
    assert "expected a head stored in bfloat16" in capsys.readouterr().err


def test_info_verifies_the_contents_of_a_large_model_only_on_request(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(place / "packed", tmp_path / "packed")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # first byte of the first tensor
    (folder / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(storage, "VERIFIED_BYTES", 0)
    assert cli.main(["info", str(folder)]) == 0
    assert cli.main(["info", str(folder), "--verify"]) == 2
    assert "has the checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kv_format", "more"),
    [
        (None, []),
        ("int8", ["--kv-format", "int8"]),
        (None, ["--prompt-lookup", "3"]),
        pytest.param(
            None,
            ["--huge-pages"],
            marks=pytest.mark.skipif(
                huge_pages.unavailable() is not None, reason=f"{huge_pages.unavailable()}"
            ),
        ),
    ],
)
def test_streamed_text_equals_generated_text(
    place: Path, capsys: pytest.CaptureFixture[str], kv_format: str | None, more: list[str]
) -> None:
    arguments = ["--prompt", "A tiny ", "--tokens", "9", "--json", f"{place}/generate.json", *more]
    assert cli.main(["generate", f"{place}/packed", *arguments]) == 0
    output = capsys.readouterr()
    model = load_model(place / "packed")
    prompt = model.tokenizer.encode("A tiny ")[None]
    given = generate(model.config, model.variables, prompt, max_new_tokens=9, kv_format=kv_format)
    tokens = np.asarray(given.tokens)[0]
    assert output.out == model.tokenizer.decode(tokens) + "\n"
    figures = read(place / "generate.json")
    assert figures["text"] == output.out[:-1]
    assert figures["tokens"] == 9
    assert figures["ran_on"][0]["name"] in output.err
    assert "9 tokens" in output.err


def test_generate_is_reproducible_for_a_seed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(seed: str) -> str:
        arguments = ["--prompt", "A", "--tokens", "15", "--temperature", "1", "--seed", seed]
        assert cli.main(["generate", f"{place}/packed", *arguments]) == 0
        return capsys.readouterr().out

    assert text("1") == text("1")
    assert text("1") != text("2")


def test_filters_sample_without_a_temperature(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--top-k 5` alone used to be silently greedy."""
    texts = []
    for temperature in ([], ["--temperature", "1"], ["--temperature", "0"]):
        words = ["--prompt", "A", "--tokens", "15", "--top-k", "5", *temperature]
        assert cli.main(["generate", f"{place}/packed", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_reads_the_prompt_from_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "prompt.txt").write_text("A tiny ")
    for source in (["--prompt", "A tiny "], ["--file", f"{place}/prompt.txt"]):
        assert cli.main(["generate", f"{place}/packed", "--tokens", "9", *source]) == 0
    out = capsys.readouterr().out
    half = len(out) // 2
    assert out[:half] == out[half:]


def test_generate_stops_at_the_trained_length_and_warns_beyond_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has 32 positions and was trained at 16: a prompt of 7 used to get 25 new tokens without a warning."""
    for asked, tokens, warned in ([], 9, 0), (["--tokens", "20"], 20, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            words = ["--prompt", "A tiny ", "--json", f"{place}/generate.json", *asked]
            assert cli.main(["generate", f"{place}/packed", *words]) == 0
        assert read(place / "generate.json")["tokens"] == tokens
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(said) == warned
        assert all("sequences of 27 tokens, the model was trained with 16" in line for line in said)


ASCII_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def in_ascii_locale(
    place: Path, words: list[str | bytes], text: bytes | None = None
) -> tuple[int, bytes, bytes]:
    """Exit code and output of a command in an ASCII-only locale."""
    environment = os.environ | ASCII_LOCALE
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(
        [sys.executable, "-m", "bitnet_jax.cli", *words],
        env=environment, input=text, capture_output=True, timeout=300, cwd=place,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_text_is_utf8_in_every_locale(place: Path) -> None:
    prompt = "na\u00efve \u65e5\u672c"
    (place / "unicode.txt").write_bytes(prompt.encode())
    # A model that always generates the letter \u00e9, so that the output is not ASCII either.
    tokenizer = CharTokenizer("\u00e9" + "".join(sorted(set(prompt))))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8, max_length=32,
        precision="float32", tie_embeddings=False,
    )  # fmt: skip
    variables = jax.jit(Transformer(config).init)(jax.random.key(0), np.zeros((1, 2), np.int32))
    variables["params"]["lm_head"]["weight"] *= 0  # ties go to the first logit
    storage.save_packed(place / "unicode", variables, config, tokenizer)
    expected = "\u00e9\u00e9\n"
    for words, text in (
        ((b"--prompt", prompt.encode()), None),
        (("--file", "unicode.txt"), None),
        ((), prompt.encode()),
    ):
        code, out, error = in_ascii_locale(place, ["generate", "unicode", "--tokens", "2", *words], text)
        assert (code, out.decode()) == (0, expected), error
    for words, text, where in (
        ((b"--prompt", b"na\xefve"), None, b"--prompt"),
        ((), b"na\xefve", b"standard input"),
    ):
        code, _, error = in_ascii_locale(place, ["generate", "unicode", *words], text)
        assert code == 2
        (line,) = error.splitlines()
        assert line.startswith(b"error: " + where + b": got text that is not UTF-8")


def test_eval_of_the_packed_model_equals_eval_of_the_run(place: Path) -> None:
    figures = []
    for folder in ("run", "packed"):
        source = ["--source", f"{place}/text.txt", "--split", "tail", "--json", f"{place}/eval.json"]
        assert cli.main(["eval", f"{place}/{folder}", *source]) == 0
        figures.append({k: v for k, v in read(place / "eval.json").items() if k != "seconds"})
    assert figures[0] == figures[1]
    assert cli.main(["eval", f"{place}/run", "--json", f"{place}/eval.json"]) == 0
    own = read(place / "eval.json")
    assert own["source"] == str(place / "text.txt")
    assert own["split"] == "tail"


def test_eval_uses_windows_of_the_trained_length_and_warns_beyond_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has 32 positions and was trained at 16: windows of 32 used to be scored without a warning."""
    source = ["--source", f"{place}/text.txt", "--split", "tail", "--json", f"{place}/eval.json"]
    figures = {}
    for asked in ("", "--length 16", "--stride 16", "--stride 4", "--length 32"):
        for folder in ("run", "packed"):
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                assert cli.main(["eval", f"{place}/{folder}", *source, *asked.split()]) == 0
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
            assert len(said) == (asked == "--length 32")
            assert all("sequences of 32 tokens, the model was trained with 16" in line for line in said)
            figures[asked, folder] = read(place / "eval.json") | {"seconds": 0}
    for folder in ("run", "packed"):
        default = figures["", folder]
        assert (default["length"], default["stride"]) == (16, 16)
        assert default == figures["--length 16", folder] == figures["--stride 16", folder]
        near = figures["--stride 4", folder]
        assert (near["tokens"], near["text_bytes"]) == (default["tokens"], default["text_bytes"])
        assert (
            near["bits_per_byte"] != default["bits_per_byte"]
        )  # each token has 12 or more tokens of context
        assert figures["--length 32", folder]["length"] == 32


def test_a_foreign_config_downloads_only_with_permission(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, streaming: bool) -> None:
        asked.append(path)
        raise ConnectionError("no network in a test")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("BITNET_JAX_ALLOW_DOWNLOAD", "")
    train = ["train", "--config", f"{place}/config.py", "--workdir", f"{tmp_path}/x", "--quiet"]
    for command in (
        [*train, "--config.data.source=hf:a/b"],
        ["eval", f"{place}/packed", "--source", "hf:a/b"],
    ):
        assert cli.main(command) == 2
        assert "pass --allow-download" in capsys.readouterr().err
        assert asked == []
        assert cli.main([*command, "--allow-download"]) == 2
        assert "no network in a test" in capsys.readouterr().err
        assert asked.pop() == "a/b"
        monkeypatch.setenv("BITNET_JAX_ALLOW_DOWNLOAD", "")


def test_eval_skips_bad_files_only_on_request(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.txt").write_text("A tiny text. " * 9)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    command = ["eval", f"{place}/packed", "--source", str(tmp_path), "--split", "all"]
    assert cli.main(command) == 2
    assert "bad.txt: got byte 0xff" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main([*command, "--skip-bad-files"]) == 0
    output = capsys.readouterr()
    assert output.err.startswith("warning: ")
    assert "skipped 1 bad files of 2: bad.txt" in output.err
    assert f"{13 * 9} bytes of" in output.out


def test_eval_of_all_data_covers_more_than_the_held_out_split(place: Path) -> None:
    counted = {}
    for split in ("tail", "all"):
        source = ["--source", f"{place}/text.txt", "--split", split, "--json", f"{place}/eval.json"]
        assert cli.main(["eval", f"{place}/packed", *source]) == 0
        counted[split] = read(place / "eval.json")["text_bytes"]
    assert counted["all"] == len((place / "text.txt").read_bytes())
    assert counted["tail"] < counted["all"]


def test_info_lists_recipe_format_and_layout_of_each_matrix(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", f"{place}/packed", "--json", f"{place}/info.json"]) == 0
    figures = read(place / "info.json")
    row = figures["matrices"]["layers_0/mlp/down_proj"]
    assert (row["shape"], row["recipe"], row["stored"]) == ([16, 48], "bitnet_b158", "ternary2 panel16")
    assert figures["bytes"]["packed"] == sum(row["bytes"] for row in figures["matrices"].values())
    assert "ternary2 panel16" in capsys.readouterr().out
    assert cli.main(["info", f"{place}/run", "--json", f"{place}/info.json"]) == 0
    assert read(place / "info.json")["matrices"]["layers_0/mlp/down_proj"]["stored"] == "float32"
