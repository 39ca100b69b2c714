"""`bitnet-jax init`: a copy of an installed config, in an otherwise empty folder, equals that config.

tests/test_commands.py checks that every copy trains with an installed wheel.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.training.config_file import load_config_file, named_configs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", named_configs())
def test_a_copy_equals_the_installed_config(name: str, elsewhere: Path) -> None:
    assert cli.main(["init", name, "mine.py"]) == 0
    assert [file.name for file in elsewhere.iterdir()] == ["mine.py"]
    assert load_config_file("mine.py").to_dict() == load_config_file(name).to_dict()


@pytest.mark.parametrize("name", named_configs())
def test_a_config_imports_only_installed_packages(name: str) -> None:
    """Repository folders are on the path of the tests, but not on a user's."""
    tree = ast.parse(named_configs()[name].read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    ours = {"ml_collections", "bitnet_experiments.configs"}
    assert imported - ours <= sys.stdlib_module_names


def test_the_list_describes_every_config(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--list", "--json", "names.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(named_configs())
    assert all(len(line.split()) > 3 for line in lines), "a name without a description"
    assert list(json.loads((elsewhere / "names.json").read_text())) == list(named_configs())


def test_an_edited_file_is_not_overwritten(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        (["byte_lm", "--list"], "NAME with --list"),
        (["byte_ml"], "byte_lm"),
        (["byte_lm:small"], "byte_lm"),
        (["byte_lm", "settings"], "ends in .py"),
        (["byte_lm", "nowhere/mine.py"], "nowhere/mine.py"),
    ],
)
def test_invalid_input_is_a_one_line_error_and_writes_nothing(
    elsewhere: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(elsewhere.iterdir()) == []
