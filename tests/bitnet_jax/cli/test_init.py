"""`bitnet-jax init`: every installed config, copied, trains in a folder that holds nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.config_file import named_configs

SMALLEST = {"quickstart": "short"}  # where the smallest variant is not called small


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of these tests: empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", named_configs())
def test_every_config_trains_from_its_copy(name: str, elsewhere: Path) -> None:
    assert cli.main(["init", name]) == 0
    assert (elsewhere / f"{name}.py").read_text() == named_configs()[name].read_text()
    variant = SMALLEST.get(name, "small")
    train = ["train", "--config", f"{name}.py:{variant}", "--workdir", "run", "--quiet"]
    assert cli.main([*train, "--config.training.steps=2", "--config.evaluation.batches=1"]) == 0
    assert json.loads((elsewhere / "run" / "result.json").read_text())["step"] == 2


def test_an_installed_config_trains_by_name_as_its_copy_does(elsewhere: Path) -> None:
    assert cli.main(["init", "byte_lm", "mine.py"]) == 0
    shorter = ["--quiet", "--config.training.steps=1", "--config.evaluation.batches=1"]
    for config, workdir in (("byte_lm:small", "named"), ("mine.py:small", "copied")):
        assert cli.main(["train", "--config", config, "--workdir", workdir, *shorter]) == 0
    named, copied = (json.loads((elsewhere / run / "config.json").read_text()) for run in ("named", "copied"))
    assert named == copied


def test_the_list_has_a_line_for_each(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--list", "--json", "names.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(named_configs())
    assert all(len(line.split()) > 3 for line in lines), "a name without a word about it"
    assert list(json.loads((elsewhere / "names.json").read_text())) == list(named_configs())


def test_an_edited_file_is_kept(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "byte_lm.py").write_text("edited")
    assert cli.main(["init", "byte_lm"]) == 2
    assert (elsewhere / "byte_lm.py").read_text() == "edited"
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["init", "byte_lm", "--overwrite"]) == 0
    assert (elsewhere / "byte_lm.py").read_text() == named_configs()["byte_lm"].read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got no NAME"),
        (["byte_lm", "--list"], "NAME beside --list"),
        (["byte_ml"], "byte_lm"),
        (["byte_lm:small"], "byte_lm"),
        (["byte_lm", "settings"], "ends in .py"),
        (["byte_lm", "nowhere/mine.py"], "nowhere/mine.py"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    elsewhere: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(elsewhere.iterdir()) == []
