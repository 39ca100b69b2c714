"""The import graph of the subpackages, read from the source and enforced.

`A: {B, ...}` means A may import B. Anything else is forbidden, and a module that no entry covers is an
error: add an entry for a new subpackage here first.
"""

from __future__ import annotations

import ast
import graphlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Modules of bitnet_jax, by longest prefix. `bitnet_jax.` is omitted on both sides.
MODEL = {"quantization", "nn", "models"}
NO_MODEL: set[str] = set()  # arrays and pytrees only
ARROWS: dict[str, set[str]] = {
    "": NO_MODEL,  # bitnet_jax/__init__.py: lazy names and a version, no work
    "optional_packages": NO_MODEL,
    "names": NO_MODEL,
    "progress": NO_MODEL,
    "quantization": {"quantization"},
    "nn": {"quantization", "nn"},
    "models": MODEL,
    "data": {"data"},
    "packed.tensor_file": NO_MODEL,
    "packed.atomic_folder": {"packed.tensor_file"},
    "packed": MODEL | {"packed", "data"},
    "interop": MODEL | {"packed", "data", "interop"},
    "conversion": MODEL | {"conversion", "data"},
    "inference": MODEL | {"inference", "data"},
    "training.losses": NO_MODEL,
    "training.metrics": NO_MODEL,
    "training.distributed": NO_MODEL,
    "training.checksums": {"training.distributed"},
    "training.checkpoints": {"training.distributed", "training.checksums"},
    "training.python_file": NO_MODEL,
    "training.config_file": {"training", "models"},
    "evaluation": MODEL | {"evaluation", "inference", "data", "training.losses"},
    "training": MODEL | {"training", "evaluation", "data", "packed"},
    "model_folders": MODEL | {"packed", "inference", "training", "data", "interop"},
    "serving": MODEL | {"serving", "inference", "data", "model_folders"},
    "tools": MODEL
    | {
        "tools",
        "model_folders",
        "conversion",
        "packed",
        "interop",
        "inference",
        "evaluation",
        "training",
        "data",
    },
    "cli": MODEL
    | {"cli", "serving", "tools", "model_folders", "packed", "inference", "evaluation", "training", "data"},
}
# The version, the errors about missing packages and unknown names, and the progress of long tasks.
EVERYWHERE = {"", "optional_packages", "names", "progress"}

# The only files outside kernels/ that may touch the kernels.
TOUCH_KERNELS = {
    "nn.linear",
    "nn.products",
    "nn.packed_gather",
    "nn.attention",
    "nn.embedding",
    "nn.head",
    "nn.batch_norm",
    "nn.norms",
    "nn.kv_cache",
    "nn.rotary",
    "inference.exact_head",
    "inference.programs",
    "training.hardware",
    "serving.passes",
    "packed",
    "interop",
    "tools",
}

# Other libraries, by root package. None: anything that pyproject.toml declares.
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
    """(line, absolute dotted module or module.name) of every import, at any nesting depth."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: the package that contains the file, one level up per further dot
                inside = file.relative_to(SOURCES[package]).parent.parts
                up = (package, *inside)[: 1 + len(inside) - (node.level - 1)]
                base = ".".join((*up, base)).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def room(module: str) -> str | None:
    """The entry of ARROWS that covers a module: the longest prefix of whole names."""
    parts = module.split(".") if module else []
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in ARROWS:
            return ".".join(parts[:length])
    return "" if not module else None


def target_room(name: str) -> str | None:
    """The entry of an imported `bitnet_jax.a.b.Name`; `bitnet_jax.Name` is the package root."""
    inside = name.removeprefix("bitnet_jax").lstrip(".")
    return room(inside) or ("" if "." not in inside else None)


def allowed(importer: str, target: str | None) -> bool:
    """Whether the import is allowed. A package may import its own parts if its entry lists itself."""
    if target is None:
        return False
    here = room(importer)
    return here is not None and (
        target in EVERYWHERE or target in ARROWS[here] or target.split(".")[0] in ARROWS[here]
    )


def test_every_import_inside_bitnet_jax_is_allowed() -> None:
    undrawn = []
    for module, file in modules("bitnet_jax"):
        if room(module) is None:
            undrawn.append(f"{file.relative_to(ROOT)}: no entry in ARROWS covers it")
        for line, name in imported(file, "bitnet_jax"):
            if name.split(".")[0] == "bitnet_jax" and not allowed(module, target_room(name)):
                undrawn.append(f"{file.relative_to(ROOT)}:{line}: {module} may not import {name}")
    assert not undrawn, "\n".join(undrawn)


def test_kernels_are_imported_only_where_allowed() -> None:
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
    """The scripts in `experiments` are not part of an installation; the package bitnet_experiments is.

    Two commands use it: `bitnet-jax sweep` and `report`.
    """
    commands = {"cli.sweep", "cli.report"}
    forbidden = {
        "bitnet_jax": {"experiments", "bitnet_experiments"},
        "bitnet_kernels": {"experiments", "bitnet_experiments"},
        "bitnet_experiments": {"experiments", "bitnet_kernels"},
        "experiments": {"bitnet_kernels"},
    }
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: imports {name}"
        for package, roots in forbidden.items()
        for module, file in modules(package)
        for line, name in imported(file, package)
        if name.split(".")[0] in roots and not (module in commands and name.startswith("bitnet_experiments"))
    ]
    assert not wrong, "\n".join(wrong)


LONGEST, MEDIAN = 450, 130  # lines of a file


def test_files_are_short() -> None:
    folders = (*SOURCES.values(), ROOT / "kernels" / "csrc", ROOT / "tests", ROOT / "docs")
    files = {
        file for folder in folders for suffix in ("py", "cc", "h") for file in folder.rglob(f"*.{suffix}")
    }
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lengths) > 300
    assert [f"{file}: {length}" for file, length in lengths.items() if length > LONGEST] == []
    assert statistics.median(lengths.values()) <= MEDIAN


def graph() -> dict[str, set[str]]:
    """Module -> the modules it imports, of all three packages, imports inside functions included."""
    files = {
        f"{package}.{module}".rstrip("."): (package, file)
        for package in ("bitnet_jax", "bitnet_kernels", "bitnet_experiments")
        for module, file in modules(package)
    }
    arrows: dict[str, set[str]] = {}
    for importer, (package, file) in files.items():
        arrows[importer] = set()
        for _, name in imported(file, package):
            while name and name not in files:  # `from a.b import c`: c is a module, or a name in a.b
                name = name.rpartition(".")[0]
            arrows[importer] |= {name} - {"", importer}
    return arrows


def test_there_are_no_import_cycles() -> None:
    arrows = graph()
    assert len(arrows) > 100
    list(graphlib.TopologicalSorter(arrows).static_order())  # CycleError names the cycle


@pytest.mark.parametrize(
    ("importer", "name", "expected"),
    [
        ("quantization.registry", "bitnet_jax.quantization.ste.sign", True),
        ("quantization.ste", "bitnet_jax.nn.linear", False),
        ("nn.linear", "bitnet_jax.quantization.precision.Precision", True),
        ("models.transformer", "bitnet_jax.packed.packing", False),
        ("training.losses", "bitnet_jax.models.transformer", False),
        ("training.losses", "bitnet_jax.training.step", False),
        ("training.loop", "bitnet_jax.training.losses.cross_entropy", True),
        ("evaluation.language", "bitnet_jax.training.loop.fit", False),
        ("evaluation.language", "bitnet_jax.training.losses", True),
        ("inference.generate", "bitnet_jax.cli", False),
        ("packed.storage", "bitnet_jax.__version__", True),
        ("a_new_room", "bitnet_jax.quantization.ste", False),
    ],
)
def test_parsing_of_the_import_graph(importer: str, name: str, expected: bool) -> None:
    assert allowed(importer, target_room(name)) is expected


def test_kernels_and_the_other_roots_are_not_packages() -> None:
    for folder in ("kernels", "experiments", "tests"):
        assert not list((ROOT / folder).glob("__init__.py")), f"{folder}/ must not hold an __init__.py"


def fresh_interpreter(code: str, *path: Path) -> str:
    """What `code` prints in a new process started in the repository root, with `path` after it on sys.path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    environment.pop(
        "PYTHONSAFEPATH", None
    )  # the root itself must come first, as for anyone working in the repository
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_name_kernels_does_not_shadow_the_package_of_that_name(tmp_path: Path) -> None:
    stand_in = tmp_path / "kernels"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("owner = 'somebody else'\n")
    code = "import sys; assert sys.path[0] == ''; import kernels; print(kernels.owner)"
    assert fresh_interpreter(code, tmp_path) == "somebody else"


def test_importing_initializes_no_device() -> None:
    """Every module of the packages: a backend initialized by an import can no longer be configured by the user."""
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
