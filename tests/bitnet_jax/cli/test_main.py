"""Behavior shared by all commands: invalid input, overrides, interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.packed import packing


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
            "did you mean 'training'",
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
def test_invalid_input_is_a_one_line_error_with_exit_code_2(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.iterdir())
    assert cli.main([word.format(place=place) for word in arguments]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in error
    assert sorted(place.iterdir()) == before, "a rejected command left files behind"


def test_debug_shows_the_traceback(place: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cli.main(["eval", f"{place}/nowhere", "--debug"])


def test_a_bug_is_not_reported_as_invalid_input(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_overrides_are_separated_from_other_arguments(
    words: list[str], overrides: list[str], others: list[str]
) -> None:
    assert cli.split_overrides(words) == (overrides, others)


def test_the_value_of_an_override_may_be_the_next_argument(place: Path, tmp_path: Path) -> None:
    train = ["train", "--config", f"{place}/config.py", "--config.training.steps", "1", "--quiet"]
    assert cli.main([*train, "--workdir", f"{tmp_path}/run", "--config.model.ffn_size", "16"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["training"]["steps"], config["model"]["ffn_size"]) == (1, 16)


def test_unknown_options_are_rejected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", f"{place}/packed", "--config.a=1"])
    assert ended.value.code == 2
    assert "got --config.a=1" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_help_text_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  bitnet-jax {command}" in out


def test_ctrl_c_exits_with_130_and_a_message(place: Path, tmp_path: Path) -> None:
    """Sends a real signal to a real process that waits for a prompt on stdin."""
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


@pytest.mark.parametrize("interrupted", ["cli.train.run", "cli.build_parser"])
def test_an_interrupted_process_skips_interpreter_finalization(interrupted: str) -> None:
    """JAX's modules crashed in it: `generate` ended with SIGSEGV after printing "interrupted"."""
    code = f"""
import atexit
from bitnet_jax.cli import main as cli
atexit.register(print, "finalized")
def interrupted(*arguments):
    print("text so far", end="")
    raise KeyboardInterrupt
{interrupted} = interrupted
cli.sys.argv = ["bitnet-jax", "train", "--config", "byte_lm", "--workdir", "x"]
cli.console()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "text so far", "interrupted\n")


def test_an_unknown_option_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--config", "byte_lm", "--workdir", "x"]
    for words, hint in (
        ([*train, "--training.steps=5"], "did you mean '--config.training.steps=5'?"),
        ([*train, "--quite"], "did you mean '--quiet'?"),
        (["generate", "x", "--promt", "a"], "did you mean '--prompt'?"),
        (["pack", "x", "y", "--overide"], "did you mean '--overwrite'?"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert hint in error
        assert error.startswith(f"usage: bitnet-jax {words[0]} ")


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian", "--quiet"])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("bitnet-jax: error: command: got 'trian', expected one of ")
    assert line.endswith("; did you mean 'train'?")


def test_ctrl_c_inside_a_callback_that_swallows_exceptions_is_not_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """JAX's garbage collector callback does this; an interrupted import or trace used to continue."""

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


def test_ctrl_c_during_class_creation_is_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    """Python 3.11 wraps an exception of `__set_name__`, which any import may call, in a RuntimeError."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    def run() -> int:
        type("Module", (), {"field": Field()})
        return 0

    assert cli.exit_code(run) == 130
    assert capsys.readouterr().err == "interrupted\n"


def _waits_for_input(pid: int) -> bool:
    """Whether the process is blocked on input; Linux exposes that, elsewhere a short wait has to do."""
    channel = Path(f"/proc/{pid}/wchan")
    if not channel.exists():
        time.sleep(10)
        return True
    return "pipe" in channel.read_text()


def test_the_command_leaves_no_global_configuration_behind(place: Path) -> None:
    assert jax.config.jax_numpy_dtype_promotion == "strict"
