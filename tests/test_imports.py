"""The arrows between the rooms of the house, read from the source and enforced.

`A: {B, ...}` means A may import B. What is not written is forbidden, and a module that no entry covers is an
error: a new room gets its place here before it gets its first line.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Modules of bitnet_jax, by the longest prefix that names them. `bitnet_jax.` is left out on both sides.
QUANTIZERS = {"ste", "scales", "weight_quantizers", "activation_quantizers", "quantizers"}
NUMBERS = QUANTIZERS | {"precision"}
MODEL = NUMBERS | {"nn", "models"}
KNOW_NO_MODEL: set[str] = set()  # arrays and pytrees only
ARROWS: dict[str, set[str]] = {
    "": KNOW_NO_MODEL,  # bitnet_jax/__init__.py: names and a version, no work
    "compat": KNOW_NO_MODEL,
    "optional_packages": KNOW_NO_MODEL,
    "progress": KNOW_NO_MODEL,
    "ste": KNOW_NO_MODEL,
    "scales": {"ste"},
    "weight_quantizers": {"ste", "scales"},
    "activation_quantizers": {"ste", "scales", "weight_quantizers"},
    "quantizers": QUANTIZERS,
    "precision": QUANTIZERS,
    "nn": NUMBERS | {"nn"},
    "models": MODEL,
    "data": {"data"},
    "training.losses": KNOW_NO_MODEL,
    "training.metrics": KNOW_NO_MODEL,
    "training.checkpoints": KNOW_NO_MODEL,
    "packing": MODEL,
    "storage": MODEL | {"data", "packing", "tensor_file", "whole_folder"},
    "tensor_file": KNOW_NO_MODEL,
    "whole_folder": {"tensor_file"},
    "random_model": MODEL | {"packing", "storage", "tensor_file"},
    "inference": MODEL | {"inference", "data"},
    "evaluation": MODEL | {"evaluation", "inference", "data", "training.losses"},
    "training": MODEL | {"training", "evaluation", "data", "packing"},
    "interop": MODEL | {"packing", "tensor_file", "data", "interop"},
    "python_file": KNOW_NO_MODEL,
    "config_file": {"python_file"},
    "model_folders": MODEL | {"packing", "storage", "inference", "training", "data", "interop"},
    "kernel_checks": KNOW_NO_MODEL,
    "doctor": MODEL | {"packing", "inference", "kernel_checks"},
    "step_kernels": MODEL | {"inference"},
    "model_bench": MODEL | {"packing", "storage", "random_model", "step_kernels", "inference", "doctor"},
    "harness": MODEL | {"evaluation", "inference", "data"},
    "energy_report": MODEL
    | {
        "packing",
        "storage",
        "inference",
        "evaluation",
        "training",
        "config_file",
        "model_bench",
        "step_kernels",
    },
    "cli": {
        "cli",
        "model_bench",
        "energy_report",
        "harness",
        "config_file",
        "doctor",
        "model_folders",
        "models",
        "packing",
        "inference",
        "evaluation",
        "training",
        "data",
    },
}
# The version, the one file that knows JAX versions differ, the words for a package that is absent, and how a long task
# says how far it is.
EVERYWHERE = {"", "compat", "optional_packages", "progress"}

# The only files outside kernels/ that may touch the kernels.
TOUCH_KERNELS = {
    "nn.linear",
    "nn.attention",
    "nn.embedding",
    "nn.batch_norm",
    "inference.exact_head",
    "packing",
    "storage",
    "random_model",
    "step_kernels",
    "model_bench",
    "interop",
    "kernel_checks",
    "doctor",
}

# Other libraries, by root. None: anything that pyproject.toml declares.
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "numpy", "ml_dtypes", "bitnet_kernels"}

SOURCES = {
    "bitnet_jax": ROOT / "bitnet_jax",
    "bitnet_kernels": ROOT / "kernels" / "bitnet_kernels",
    "bitnet_experiments": ROOT / "experiments" / "bitnet_experiments",
    "experiments": ROOT / "experiments",
}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """(dotted name inside the package, file) of every source file."""
    folder = SOURCES[package]
    for file in sorted(folder.rglob("*.py")):
        parts = list(file.relative_to(folder).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imported(file: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted module or module.name) of every import, at any depth of the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if (
                node.level
            ):  # relative: the package that holds the file, up as many levels as there are further dots
                inside = file.relative_to(SOURCES[package]).parent.parts
                up = (package, *inside)[: 1 + len(inside) - (node.level - 1)]
                base = ".".join((*up, base)).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def room(module: str) -> str | None:
    """The entry of ARROWS that covers a module: the longest prefix, whole names only."""
    parts = module.split(".") if module else []
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in ARROWS:
            return ".".join(parts[:length])
    return "" if not module else None


def target_room(name: str) -> str | None:
    """Where an imported `bitnet_jax.a.b.Name` lives; `bitnet_jax.Name` is the package root itself."""
    inside = name.removeprefix("bitnet_jax").lstrip(".")
    return room(inside) or ("" if "." not in inside else None)


def allowed(importer: str, target: str | None) -> bool:
    """Is the arrow drawn? A package may import its own parts when it names itself."""
    if target is None:
        return False
    here = room(importer)
    return here is not None and (
        target in EVERYWHERE or target in ARROWS[here] or target.split(".")[0] in ARROWS[here]
    )


def test_every_arrow_inside_bitnet_jax_is_drawn() -> None:
    undrawn = []
    for module, file in modules("bitnet_jax"):
        if room(module) is None:
            undrawn.append(f"{file.relative_to(ROOT)}: no entry in ARROWS covers it")
        for line, name in imported(file, "bitnet_jax"):
            if name.split(".")[0] == "bitnet_jax" and not allowed(module, target_room(name)):
                undrawn.append(f"{file.relative_to(ROOT)}:{line}: {module} may not import {name}")
    assert not undrawn, "\n".join(undrawn)


def test_kernels_are_touched_only_where_drawn() -> None:
    touching = [
        f"{file.relative_to(ROOT)}:{line}: imports {name}"
        for module, file in modules("bitnet_jax")
        if not any(module == place or module.startswith(f"{place}.") for place in TOUCH_KERNELS)
        for line, name in imported(file, "bitnet_jax")
        if name.split(".")[0] == "bitnet_kernels"
    ]
    assert not touching, "\n".join(touching)


def test_bitnet_kernels_imports_only_jax_numpy_and_itself() -> None:
    foreign = [
        f"{file.relative_to(ROOT)}:{line}: imports {name}"
        for _, file in modules("bitnet_kernels")
        for line, name in imported(file, "bitnet_kernels")
        if name.split(".")[0] not in KERNELS_MAY_IMPORT | sys.stdlib_module_names
    ]
    assert not foreign, "\n".join(foreign)


def test_nothing_imports_experiments_and_they_reach_the_kernels_through_bitnet_jax() -> None:
    """The scripts in `experiments` are no part of an installation; the package bitnet_experiments is."""
    forbidden = {
        "bitnet_jax": {"experiments", "bitnet_experiments"},
        "bitnet_kernels": {"experiments", "bitnet_experiments"},
        "bitnet_experiments": {"experiments", "bitnet_kernels"},
        "experiments": {"bitnet_kernels"},
    }
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: imports {name}"
        for package, roots in forbidden.items()
        for _, file in modules(package)
        for line, name in imported(file, package)
        if name.split(".")[0] in roots
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "name", "expected"),
    [
        ("quantizers", "bitnet_jax.ste.sign", True),
        ("ste", "bitnet_jax.quantizers.binary", False),
        ("nn.linear", "bitnet_jax.precision.Precision", True),
        ("precision", "bitnet_jax.nn.linear.BitLinear", False),
        ("models.transformer", "bitnet_jax.packing", False),
        ("training.losses", "bitnet_jax.models.transformer", False),
        ("training.losses", "bitnet_jax.training.step", False),
        ("training.loop", "bitnet_jax.training.losses.cross_entropy", True),
        ("evaluation.language", "bitnet_jax.training.loop.fit", False),
        ("evaluation.language", "bitnet_jax.training.losses", True),
        ("inference.generate", "bitnet_jax.cli", False),
        ("storage", "bitnet_jax.__version__", True),
        ("a_new_room", "bitnet_jax.ste", False),
    ],
)
def test_the_reading_of_the_graph(importer: str, name: str, expected: bool) -> None:
    assert allowed(importer, target_room(name)) is expected


def test_kernels_and_the_other_roots_are_not_packages() -> None:
    for folder in ("kernels", "experiments", "tests"):
        assert not list((ROOT / folder).glob("__init__.py")), f"{folder}/ must not hold an __init__.py"


def fresh_interpreter(code: str, *path: Path) -> str:
    """What `code` prints in a new process started in the repository root, with `path` behind it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    environment.pop("PYTHONSAFEPATH", None)  # the root itself must come first, as for anyone working in it
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_name_kernels_stays_free_for_the_package_of_that_name(tmp_path: Path) -> None:
    stand_in = tmp_path / "kernels"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("owner = 'somebody else'\n")
    code = "import sys; assert sys.path[0] == ''; import kernels; print(kernels.owner)"
    assert fresh_interpreter(code, tmp_path) == "somebody else"


def test_importing_starts_no_device() -> None:
    """Every module of the packages: a backend that an import starts can no longer be set up by its user."""
    names = [
        f"{package}.{module}".rstrip(".")
        for package in ("bitnet_jax", "bitnet_kernels", "bitnet_experiments")
        for module, _ in modules(package)
        if not module.endswith("__main__")
    ]
    code = f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert fresh_interpreter(code, ROOT / "kernels", ROOT / "experiments") == "False"
