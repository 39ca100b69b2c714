"""Config files: variants, overrides, and rejected input."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bitnet_jax.training.config_file import load_config_file, named_configs

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="base"):
    if variant not in ("base", "small"):
        raise ValueError(f"got variant {variant!r}, expected base or small")
    model = ConfigDict({"rate": 1e-3, "name": "bitnet", "tied": True, "sizes": (1, 2)})
    return ConfigDict({"steps": 10 if variant == "small" else 100, "model": model})
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "config.py").write_text(CONFIG)
    return str(tmp_path / "config.py")


def test_variants(spec: str) -> None:
    assert load_config_file(spec).steps == 100
    assert load_config_file(f"{spec}:small").steps == 10


def test_overrides_keep_the_type_of_their_field(spec: str) -> None:
    overrides = ["--config.steps=7", "--config.model.rate=1", "--config.model.name=3"]
    overrides += ["--config.model.tied=false", "--config.model.sizes=(4, 5)"]
    config = load_config_file(f"{spec}:small", overrides)
    assert config.steps == 7
    assert config.model.to_dict() == {"rate": 1.0, "name": "3", "tied": False, "sizes": (4, 5)}
    assert isinstance(config.model.rate, float)


def test_overrides_may_name_fields_with_a_default_that_the_file_lacks(spec: str) -> None:
    overrides = ["--config.distributed.coordinator=host:1", "--config.distributed.processes=2"]
    overrides += ["--config.training.max_loss=9", "--config.model.dropout=0.1", "--config.init=runs/float"]
    config = load_config_file(spec, overrides)
    assert config.distributed.to_dict() == {"coordinator": "host:1", "processes": 2}
    assert config.training.to_dict() == {"max_loss": 9.0}
    assert config.model.dropout == 0.1
    assert config.init == "runs/float"


def test_the_command_line_of_the_process_is_ignored(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest", "--config=elsewhere.py", "--config.steps=1"])
    assert load_config_file(spec).steps == 100


@pytest.mark.parametrize(
    ("variant", "override", "message"),
    [
        (":huge", "--config.steps=1", "got variant 'huge'"),
        ("", "--config.step=1", "field of config: got 'step', .*did you mean 'steps'"),
        ("", "--config.modle.rate=1", "field of config: got 'modle', .*did you mean 'model'"),
        ("", "--config.steps.x=1", "field of config.steps: got 'x', expected one of none"),
        ("", "--config.model.sizes[9]=1", "out of range"),
        ("", "--config.steps=many", "many"),
        ("", "--config.steps", "Missing value"),
        ("", "--config.model=1", "ConfigDict"),
        ("", "--config.model.tied=perhaps", "perhaps"),
        ("", "--other=1", "got --other=1"),
        ("", "word", "got word"),
    ],
)
def test_invalid_overrides_are_one_line_errors(spec: str, variant: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config_file(spec + variant, [override])
    assert "\n" not in str(error.value)


def test_invalid_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_config_file(str(tmp_path / "none.py:small"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="get_config"):
        load_config_file(str(tmp_path / "empty.py"))
    (tmp_path / "number.py").write_text("def get_config(): return 3")
    with pytest.raises(ValueError, match="got int"):
        load_config_file(str(tmp_path / "number.py"))
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_config_file(str(tmp_path / "folder.py"))
    with pytest.raises(ValueError, match="expected a regular Python file"):
        load_config_file(str(tmp_path / "pipe.py"))
    (tmp_path / "large.py").write_bytes(b"#" * 2**21)
    with pytest.raises(ValueError, match=r"2,097,152 bytes, expected a Python file of at most 1,048,576"):
        load_config_file(str(tmp_path / "large.py"))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("x = 1\ndef get_config(:", 2, "SyntaxError: invalid syntax"),
        ("\n\nx = y", 3, "NameError: name 'y' is not defined"),
        ("import no_such_module", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0", 2, "ZeroDivisionError"),
        ("def get_config():\n    raise KeyError('a\\nb')", 2, "KeyError"),
        ("def get_config():\n    return get_config()", 2, "RecursionError"),
        ("import sys\nsys.exit(3)", 2, "SystemExit: 3"),
        ("from ml_collections import ConfigDict\nConfigDict().a", 2, "AttributeError"),
    ],
)
def test_an_error_in_the_file_is_one_line_with_its_location(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        load_config_file(str(file))
    assert str(error.value).startswith(f"{file}:{line}: {message}")
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_python_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "binary.py"
    file.write_bytes(b"\x00\xff\xfe")
    with pytest.raises(ValueError, match=r"binary.py"):
        load_config_file(str(file))


def test_a_config_may_define_dataclasses(tmp_path: Path) -> None:
    """Dataclasses look up their module by name."""
    text = "from __future__ import annotations\nimport dataclasses\n"
    text += "@dataclasses.dataclass\nclass Sizes:\n    width: int = 3\n"
    (tmp_path / "config.py").write_text(text + CONFIG.replace("steps", "width"))
    assert load_config_file(str(tmp_path / "config.py")).width == 100


def test_an_installed_config_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_configs()["byte_lm"].name == "byte_lm.py"
    by_file = load_config_file(f"{named_configs()['byte_lm']}:small", ["--config.seed=3"])
    assert load_config_file("byte_lm:small", ["--config.seed=3"]) == by_file
    assert load_config_file("byte_lm").training.steps > by_file.training.steps


def test_a_file_in_the_current_folder_takes_precedence_over_a_name(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(spec).rename("byte_lm.py")
    assert load_config_file("byte_lm.py:small").steps == 10
    assert "steps" not in load_config_file("byte_lm:small"), "a name is not a file"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte_ml", "did you mean 'byte_lm'"),
        ("byte_ml:small", "did you mean 'byte_lm'"),
        ("entirely_else", "byte_lm, law_lm, mnist_cnn"),
        ("byte_lm.py:small", "without .py; did you mean 'byte_lm'"),
        ("experiments/configs/mnist_cnn.py", "without .py; did you mean 'mnist_cnn'"),
        ("nowhere/byte_lm", "there is no file nowhere/byte_lm"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message) as error:
        load_config_file(spec)
    assert "\n" not in str(error.value)


def test_names_require_the_package_that_contains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="no package bitnet_experiments"):
        load_config_file("byte_lm")
