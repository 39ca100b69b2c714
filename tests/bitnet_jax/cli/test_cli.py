"""The command from outside: what it prints, writes, and how it ends. One tiny run serves all tests."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
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
from bitnet_jax.packed import packing, storage

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="float"):
    recipes = {"float": "float32", "ternary": "bitnet_b158"}
    if variant not in recipes:
        raise ValueError(f"got variant {variant!r}, expected one of {sorted(recipes)}")
    config = ConfigDict(dict(seed=0))
    config.model = ConfigDict(dict(
        hidden_size=16, ffn_size=32, num_layers=1, num_heads=2, max_length=32, precision=recipes[variant],
    ))
    config.data = ConfigDict(dict(source="SOURCE", split="tail", valid_fraction=0.2, length=16, batch_size=2))
    config.training = ConfigDict(dict(steps=3, eval_every=3, checkpoint_every=2, log_every=1))
    config.evaluation = ConfigDict(dict(batches=1, batch_size=2))
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, config.py, `run` trained from them and `packed` made from that, all by command."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text("A tiny text about quantized numbers. " * 20)
    (place / "config.py").write_text(CONFIG.replace("SOURCE", str(place / "text.txt")))
    train = ["train", "--config", f"{place}/config.py:ternary", "--workdir", f"{place}/run", "--quiet"]
    overrides = ["--config.training.steps=2", "--config.model.ffn_size=48"]
    assert cli.main([*train, *overrides, "--json", f"{place}/train.json"]) == 0
    pack = ["pack", f"{place}/run", f"{place}/packed", "--tokens", "40", "--json", f"{place}/pack.json"]
    assert cli.main(pack) == 0
    return place


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_train_reports_the_result_of_the_run(place: Path) -> None:
    assert read(place / "train.json") == read(place / "run" / "result.json")
    assert read(place / "train.json")["status"] == "finished"
    assert read(place / "train.json")["step"] == 2


def test_a_finished_run_is_extended_or_overwritten(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--config", f"{place}/config.py", "--workdir", f"{tmp_path}/run", "--quiet"]
    typo = [*train, "--config.data.source=nowhere"]
    assert cli.main(typo) == 2
    assert cli.main([*train, "--config.training.steps=1"]) == 0, "a typo leaves nothing to clean up"
    capsys.readouterr()
    assert cli.main([*train, "--config.training.steps=2"]) == 0
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert (
        "1 before, 2 now; going on from step 1, from here on schedule='cosine' as computed for 2" in told.err
    )
    assert json.loads(told.out)["extended_from"] == [1]
    assert cli.main([*train, "--config.training.steps=1"]) == 2
    assert "got 1, expected at least the 2" in capsys.readouterr().err
    assert cli.main([*typo, "--overwrite"]) == 2
    assert read(tmp_path / "run" / "result.json")["step"] == 2, "what cannot be replaced stays"
    assert cli.main([*train, "--config.training.steps=1", "--config.seed=1", "--overwrite"]) == 0
    assert read(tmp_path / "run" / "result.json")["step"] == 1


def test_variant_and_overrides_reach_the_run(place: Path) -> None:
    config = read(place / "run" / "config.json")
    assert (config["training"]["steps"], config["model"]["ffn_size"]) == (2, 48)
    assert config["model"]["precision"] == "bitnet_b158"


def test_pack_proves_and_writes(place: Path) -> None:
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
        """One sign of one packed matrix differs: the smallest way to be another model."""
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


def test_pack_stores_another_head_and_info_shows_it(
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
    _, config, variables, tokenizer, _ = load_model(place / "packed")
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


def test_info_reads_the_contents_of_a_large_model_where_that_is_asked_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(place / "packed", tmp_path / "packed")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # of the first tensor
    (folder / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(storage, "VERIFIED_BYTES", 0)
    assert cli.main(["info", str(folder)]) == 0
    assert cli.main(["info", str(folder), "--verify"]) == 2
    assert "has the checksum" in capsys.readouterr().err


@pytest.mark.parametrize("kv_format", [None, "int8"])
def test_generate_streams_what_generate_gives(
    place: Path, capsys: pytest.CaptureFixture[str], kv_format: str | None
) -> None:
    arguments = ["--prompt", "A tiny ", "--tokens", "9", "--json", f"{place}/generate.json"]
    arguments += ["--kv-format", kv_format] if kv_format else []
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


def test_generate_is_reproducible_by_its_seed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(seed: str) -> str:
        arguments = ["--prompt", "A", "--tokens", "15", "--temperature", "1", "--seed", seed]
        assert cli.main(["generate", f"{place}/packed", *arguments]) == 0
        return capsys.readouterr().out

    assert text("1") == text("1")
    assert text("1") != text("2")


def test_generate_reads_the_prompt_from_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "prompt.txt").write_text("A tiny ")
    for source in (["--prompt", "A tiny "], ["--file", f"{place}/prompt.txt"]):
        assert cli.main(["generate", f"{place}/packed", "--tokens", "9", *source]) == 0
    out = capsys.readouterr().out
    half = len(out) // 2
    assert out[:half] == out[half:]


def test_generate_keeps_to_the_trained_length_and_warns_beyond_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has 32 positions and was trained at 16: 25 tokens used to follow a prompt of 7 without a word."""
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
    """Exit code and output of a command where Python knows ASCII alone."""
    environment = os.environ | ASCII_LOCALE
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(
        [sys.executable, "-m", "bitnet_jax.cli", *words],
        env=environment, input=text, capture_output=True, timeout=300, cwd=place,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_text_is_utf8_in_any_locale(place: Path) -> None:
    prompt = "na\u00efve \u65e5\u672c"
    (place / "unicode.txt").write_bytes(prompt.encode())
    # A model that always writes the letter \u00e9, so that what is printed is not ASCII either.
    tokenizer = CharTokenizer("\u00e9" + "".join(sorted(set(prompt))))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8, max_length=32,
        precision="float32", tie_embeddings=False,
    )  # fmt: skip
    variables = jax.jit(Transformer(config).init)(jax.random.key(0), np.zeros((1, 2), np.int32))
    variables["params"]["lm_head"]["weight"] *= 0  # of equal logits the first one is taken
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


def test_eval_of_packed_equals_eval_of_latent(place: Path) -> None:
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


def test_eval_takes_windows_of_the_trained_length_and_warns_beyond_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has 32 positions and was trained at 16: windows of 32 used to be taken without a word."""
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
        assert near["bits_per_byte"] != default["bits_per_byte"]  # each token has 12 or more in front
        assert figures["--length 32", folder]["length"] == 32


def test_a_config_of_somebody_else_downloads_only_with_leave(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(path: str, name: str | None) -> None:
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


def test_eval_leaves_bad_files_out_only_if_asked(
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
    assert "left out 1 bad files of 2: bad.txt" in output.err
    assert f"{13 * 9} bytes of" in output.out


def test_eval_of_all_sees_more_than_the_held_out_part(place: Path) -> None:
    counted = {}
    for split in ("tail", "all"):
        source = ["--source", f"{place}/text.txt", "--split", split, "--json", f"{place}/eval.json"]
        assert cli.main(["eval", f"{place}/packed", *source]) == 0
        counted[split] = read(place / "eval.json")["text_bytes"]
    assert counted["all"] == len((place / "text.txt").read_bytes())
    assert counted["tail"] < counted["all"]


def test_info_names_recipe_format_and_layout_of_each_matrix(
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{place}/nowhere"], "there is no such folder"),
        (["info", "{place}"], "expected checkpoints/"),
        (["info", "{place}/packed", "--step", "3"], "expected no step"),
        (["info", "{place}/packed", "--json", "{place}/nowhere/x.json"], "in an existing folder"),
        (["pack", "{place}/run", "{place}/packed"], "packed, which exists"),
        (["pack", "{place}/packed", "{place}/again"], "packed"),
        (["pack", "{place}/run", "{place}/again", "--step", "77"], "77"),
        (["pack", "{place}/run", "{place}/again", "--tokens", "-1"], "tokens=-1"),
        (["generate", "{place}/packed", "--prompt", ""], "no tokens"),
        (["generate", "{place}/packed", "--prompt", "A", "--tokens", "500"], "max_length=32"),
        (["generate", "{place}/packed", "--prompt", "A", "--top-p", "2"], "top_p"),
        (["generate", "{place}/packed", "--file", "{place}/nowhere.txt"], "No such file"),
        (["eval", "{place}/packed", "--source", "{place}/nowhere.txt"], "nowhere.txt"),
        (["eval", "{place}/packed", "--source", "hf:a/b"], "pass --allow-download"),
        (
            ["train", "--config", "{place}/config.py", "--workdir", "{place}/x", "--config.data.limit=-5"],
            "data.limit",
        ),
        (
            ["eval", "{place}/packed", "--stride", "17"],
            "stride 17, expected at least 1 and the stride at most",
        ),
        (["eval", "{place}/packed", "--harness", "x", "--limit", "-1"], "--limit -1, expected at least 1"),
        (["eval", "{place}/packed", "--max-tokens", "-1"], "max_tokens: got -1, expected at least 1"),
        (["eval", "{place}/packed", "--valid-fraction", "0"], "valid_fraction: got 0.0, expected a number"),
        (["train", "--config", "{place}/nowhere.py", "--workdir", "{place}/x"], "there is no file"),
        (["train", "--config", "{place}/config.py:huge", "--workdir", "{place}/x"], "'huge'"),
        (
            ["train", "--config", "{place}/config.py", "--workdir", "{place}/x", "--config.trainig.steps=3"],
            "config has no field 'trainig', expected one of training",
        ),
        (
            [
                "train",
                "--config",
                "{place}/config.py",
                "--workdir",
                "{place}/x",
                "--config.data.source=nowhere",
            ],
            "nowhere",
        ),
        (
            ["train", "--config", "{place}/config.py", "--workdir", "{place}/x", "--config.training.step=1"],
            "step",
        ),
        (
            [
                "train",
                "--config",
                "{place}/config.py",
                "--workdir",
                "{place}/x",
                "--config.model.precision=b",
            ],
            "'b'",
        ),
        (["train", "--config", "{place}/config.py", "--workdir", "{place}/run", "--config.seed=1"], "seed"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.iterdir())
    assert cli.main([word.format(place=place) for word in arguments]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in error
    assert sorted(place.iterdir()) == before, "a refused command left something behind"


def test_debug_shows_the_traceback(place: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cli.main(["eval", f"{place}/nowhere", "--debug"])


def test_a_bug_is_not_dressed_up_as_wrong_input(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "sizes", lambda variables: variables["no such key"])
    with pytest.raises(KeyError):
        cli.main(["info", f"{place}/packed"])


@pytest.mark.parametrize(
    ("words", "overrides", "others"),
    [
        (["--config.a=1", "--quiet"], ["--config.a=1"], ["--quiet"]),
        (["--config.a", "1", "--config", "x.py"], ["--config.a=1"], ["--config", "x.py"]),
        (["--config.a", "-1", "--config.b", "--quiet"], ["--config.a=-1", "--config.b"], ["--quiet"]),
        (["--config.a"], ["--config.a"], []),
        (["word", "--config=x.py"], [], ["word", "--config=x.py"]),
    ],
)
def test_overrides_are_told_from_the_other_words(
    words: list[str], overrides: list[str], others: list[str]
) -> None:
    assert cli.split_overrides(words) == (overrides, others)


def test_the_value_of_an_override_may_be_the_next_word(place: Path, tmp_path: Path) -> None:
    train = ["train", "--config", f"{place}/config.py", "--config.training.steps", "1", "--quiet"]
    assert cli.main([*train, "--workdir", f"{tmp_path}/run", "--config.model.ffn_size", "16"]) == 0
    config = read(tmp_path / "run" / "config.json")
    assert (config["training"]["steps"], config["model"]["ffn_size"]) == (1, 16)


def test_unknown_options_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", f"{place}/packed", "--config.a=1"])
    assert ended.value.code == 2
    assert "got --config.a=1" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  bitnet-jax {command}" in out


def test_ctrl_c_ends_with_130_and_a_word(place: Path, tmp_path: Path) -> None:
    """A real process and a real signal, sent while it waits for a prompt that never comes."""
    code = "import sys; print('up', flush=True); from bitnet_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", f"{place}/packed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        while not _waits_for_input(process.pid):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "interrupted"


def test_ctrl_c_within_a_callback_that_drops_exceptions_is_not_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As JAX's callback of the garbage collector does; a process that was being imported or traced went on."""

    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def run() -> int:
        Interrupted()
        time.sleep(5)
        return 0

    before = sys.unraisablehook
    assert cli.exit_code(run) == 130
    assert sys.unraisablehook is before
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_while_a_class_is_made_is_an_interrupt_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Python 3.11 wraps what `__set_name__` raises, as it may during any import, in a RuntimeError."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    def run() -> int:
        type("Module", (), {"field": Field()})
        return 0

    assert cli.exit_code(run) == 130
    assert capsys.readouterr().err == "interrupted\n"


def _waits_for_input(pid: int) -> bool:
    """Linux tells where a process sleeps; elsewhere a moment has to do."""
    channel = Path(f"/proc/{pid}/wchan")
    if not channel.exists():
        time.sleep(10)
        return True
    return "pipe" in channel.read_text()


def test_nothing_is_left_configured_by_the_command(place: Path) -> None:
    assert jax.config.jax_numpy_dtype_promotion == "strict"
