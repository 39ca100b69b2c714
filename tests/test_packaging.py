"""The installed distribution: every package, declared dependencies, one version."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bitnet_jax
from bitnet_jax.optional_packages import PURPOSES, missing_package

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ROOTS = {
    "bitnet_jax": ROOT / "bitnet_jax",
    "bitnet_kernels": ROOT / "kernels" / "bitnet_kernels",
    "bitnet_experiments": ROOT / "experiments" / "bitnet_experiments",
}
# Import names that differ from the name on the package index.
DISTRIBUTIONS = {
    "orbax": "orbax-checkpoint",
    "absl": "absl-py",
    "tensorboardX": "tensorboardx",
    "pynvml": "nvidia-ml-py",
    "PIL": "pillow",
    "llama_cpp": "llama-cpp-python",
}
# Installed with every jax.
WITH_JAX = {"jaxlib", "ml-dtypes", "scipy"}


def names(requirements: list[str]) -> set[str]:
    """Normalized distribution names of requirement strings."""
    return {re.split(r"[\s<>=!~;\[]", text, maxsplit=1)[0].lower().replace("_", "-") for text in requirements}


def third_party(folder: Path) -> set[str]:
    """Distributions that the modules of a folder import, at any nesting depth."""
    roots = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add((node.module or "").split(".")[0])
    ours = {*ROOTS, "experiments", "__future__"}
    return {
        DISTRIBUTIONS.get(root, root).lower().replace("_", "-")
        for root in roots - ours - sys.stdlib_module_names
    }


def test_everything_imported_is_declared() -> None:
    required = names(PROJECT["dependencies"]) | WITH_JAX
    extras = names(sum(PROJECT["optional-dependencies"].values(), []))
    for package, folder in ROOTS.items():
        undeclared = third_party(folder) - required - extras
        assert not undeclared, f"{package} imports {undeclared}, which pyproject.toml does not declare"
    undeclared = third_party(ROOT / "experiments") - required - extras
    assert not undeclared, f"experiments import {undeclared}, which pyproject.toml does not declare"


def test_every_declared_dependency_is_used() -> None:
    used = set().union(*map(third_party, (*ROOTS.values(), ROOT / "experiments")))
    assert names(PROJECT["dependencies"]) <= used


def test_every_dependency_has_both_bounds_and_the_installed_version_is_within_them() -> None:
    for requirement in map(Requirement, PROJECT["dependencies"]):
        operators = {clause.operator for clause in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement}: expected a lower and an upper bound"
        assert importlib.metadata.version(requirement.name) in requirement.specifier, requirement


@pytest.mark.parametrize(
    "file", sorted((ROOT / "requirements").glob("ci-py*.txt")), ids=lambda file: file.stem
)
def test_the_pins_of_continuous_integration_are_complete_and_within_the_bounds(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines), (
        "a pin of a location instead of a version"
    )
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["plots"], *extras["test"], *extras["lint"]):
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, f"{text}; make lock"


def test_continuous_integration_installs_its_pins() -> None:
    """With make, which passes them on; a Python version without a pin file gets what the bounds allow."""
    make = ["make", "--dry-run", "VENV=nowhere", "nowhere/.installed-for-development"]
    for pins in ("", "requirements/ci-py311.txt"):
        shown = subprocess.run(
            make, cwd=ROOT, env=os.environ | {"CONSTRAINTS": pins}, capture_output=True, text=True, check=True
        ).stdout
        assert f"CONSTRAINTS={pins} nowhere/bin/python requirements/install.py plots test lint docs" in shown
    assert (ROOT / "requirements" / "ci-py311.txt").is_file()
    assert "export CONSTRAINTS=$constraints" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("pins", ["", "pins.txt"])
def test_install_gives_pip_what_an_editable_install_would(monkeypatch: pytest.MonkeyPatch, pins: str) -> None:
    install = runpy.run_path(str(ROOT / "requirements" / "install.py"))
    commands: list[list[str]] = []

    class Compiler(contextlib.AbstractContextManager[None]):
        def __init__(self, command: list[str], **_: object) -> None:
            commands.append(command)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setenv("CONSTRAINTS", pins)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(subprocess, "Popen", Compiler)
    monkeypatch.setitem(install["main"].__globals__, "LIBRARY", Path("nowhere") / "_cpu.so")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    install["main"](["plots", "test"])

    tools, compiler, packages, editable = (command[len(install["PIP"]) :] for command in commands)
    assert tools[-3:] == PYPROJECT["build-system"]["requires"]
    assert "build_ext" in commands[1]
    extras = PROJECT["optional-dependencies"]
    constraints = ["--constraint", pins] if pins else []
    assert packages == [*constraints, *PROJECT["dependencies"], *extras["plots"], *extras["test"]]
    assert editable == ["--no-deps", "--no-build-isolation", "--editable", "."]


@pytest.mark.parametrize("unwritten", [True, False])
def test_bytecode_is_there_after_an_installation_or_the_first_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unwritten: bool
) -> None:
    (tmp_path / "module_of_this_test.py").write_text("import imported_by_it")
    (tmp_path / "imported_by_it.py").write_text("")
    monkeypatch.setattr(sys, "dont_write_bytecode", unwritten)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runpy.run_path(str(ROOT / "requirements" / "install.py"))["write_bytecode"]("module_of_this_test")
    assert len(list(tmp_path.glob("__pycache__/*.pyc"))) == (2 if unwritten else 0)


def test_every_folder_with_code_is_a_package() -> None:
    """find_packages silently leaves out a folder without __init__.py."""
    for folder in ROOTS.values():
        with_code = {file.parent for file in folder.rglob("*.py")}
        assert {place for place in with_code if not (place / "__init__.py").exists()} == set()


def test_the_version_is_a_literal_that_setuptools_can_read() -> None:
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "bitnet_jax.__version__"}
    tree = ast.parse((ROOT / "bitnet_jax" / "__init__.py").read_text())
    literals = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    ]
    assert literals == [bitnet_jax.__version__]
    assert re.fullmatch(r"\d+\.\d+\.\d+", bitnet_jax.__version__)
    assert bitnet_jax.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert bitnet_jax.__version__ in (ROOT / "README.md").read_text(), "the citation names the version"


def test_the_command_exists() -> None:
    module, _, function = PROJECT["scripts"]["bitnet-jax"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_library_is_built_with_the_oldest_supported_headers() -> None:
    """Headers newer than the runtime would disable the CPU backend."""
    oldest = next(text for text in PROJECT["dependencies"] if text.startswith("jax>="))
    assert oldest.partition(",")[0].replace("jax>=", "jaxlib==") in PYPROJECT["build-system"]["requires"]


def test_the_license_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert text.rstrip().endswith("limitations under the License.")


def build(target: Path, **environment: str) -> zipfile.ZipFile:
    """The wheel that pip makes of a copy of the sources."""
    source = target / "source"
    source.mkdir()
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "bitnet_jax",
        "kernels",
        "experiments",
    ):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    for built in (*source.rglob("*.so"), *source.rglob("*.egg-info")):
        subprocess.run(["rm", "-r", built], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", target, source]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.slow
def test_the_wheel_holds_every_package_and_the_library_and_serves_every_python(tmp_path: Path) -> None:
    wheel = build(tmp_path)
    assert re.search(r"-py3-none-(linux|macosx|manylinux)", wheel.filename)
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in ROOTS.items()
        for pattern in ("*.py", *PYPROJECT["tool"]["setuptools"]["package-data"]["*"])
        for file in folder.rglob(pattern)
    }
    assert "bitnet_jax/serving/chat.html" in expected
    assert files == expected | {"bitnet_kernels/_cpu.so"}


@pytest.mark.slow
def test_the_wheel_is_built_without_a_compiler(tmp_path: Path) -> None:
    wheel = build(tmp_path, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert "bitnet_kernels/matmul.py" in wheel.namelist()
    assert "bitnet_kernels/_cpu.so" not in wheel.namelist()


def test_install_instructions_name_packages_on_an_index() -> None:
    """`bitnet-jax[extra]` is on no index; and every error about a missing package comes from one module."""
    extras = PROJECT["optional-dependencies"]
    listed = {re.split(r"[\s<>=!~;\[]", text, maxsplit=1)[0] for text in sum(extras.values(), [])}
    assert set(PURPOSES) <= listed
    for name in PURPOSES:
        assert missing_package(name).endswith(f"; pip install {name}")
    sources = [file for folder in (*ROOTS.values(), ROOT / "experiments") for file in folder.rglob("*.py")]
    pages = [*ROOT.glob("*.md"), *(ROOT / "experiments").glob("*.md"), ROOT / "kernels" / "README.md"]
    for file in (*sources, *pages):
        text = file.read_text()
        assert not re.search(r"bitnet[-_]jax\[", text), (
            f"{file}: names an extra of a package that is on no index"
        )
        if file.suffix == ".py" and file.name != "optional_packages.py":
            assert "pip install" not in text, (
                f"{file}: has its own install instructions; use bitnet_jax.optional_packages"
            )


# They draw into axes made by pages.draw, which already raises where matplotlib is missing.
GIVEN_AXES = {"frontier.py", "axes.py"}
TYPES_ONLY = re.compile(r"^if TYPE_CHECKING:\n(?: +.*\n|\n)+", re.MULTILINE)


def test_every_import_of_an_optional_package_says_how_to_install_it() -> None:
    modules = {
        "lm-eval": "lm_eval", "llama-cpp-python": "llama_cpp", "nvidia-ml-py": "pynvml",
        "rouge-score": "rouge_score", "pillow": "PIL", "prometheus-client": "prometheus_client",
    }  # fmt: skip
    for name in PURPOSES:
        imported = re.compile(rf"^ +(?:import|from) {modules.get(name, name)}\b", re.MULTILINE)
        users = [
            file
            for file in (*ROOTS["bitnet_jax"].rglob("*.py"), *ROOTS["bitnet_experiments"].rglob("*.py"))
            if imported.search(TYPES_ONLY.sub("", file.read_text())) and file.name not in GIVEN_AXES
        ]
        assert users, f"nothing imports {name}"
        for file in users:
            text = file.read_text().replace('"', "'")
            told = f"missing_package('{name}')" in text or (name == "lm-eval" and "check_harness()" in text)
            assert told, f"{file}: {name}"
