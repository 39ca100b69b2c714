"""The C++ library as a whole: its exports, its README, and that no exception escapes from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bitnet_kernels import FORMATS, cpu, matmul
from bitnet_kernels.packed import LAYOUTS

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
built = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
linux = pytest.mark.skipif(sys.platform != "linux", reason="symbols are looked up as on Linux")
compiles = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (set CXX, or install g++)")


@pytest.fixture
def csrc(repository: Path) -> Path:
    return repository / "kernels" / "csrc"


@pytest.fixture
def readme(repository: Path) -> str:
    return (repository / "kernels" / "README.md").read_text()


def table(page: str, header: str) -> list[list[str]]:
    """The cells of the table with the given header."""
    lines = page[page.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def table_of_kernels(csrc: Path) -> list[str]:
    return re.findall(r'= \{"(\w+)", ', (csrc / "kernels.cc").read_text())


@built
@linux
@compiles
def test_without_memory_or_threads_no_exception_leaves_the_library(tmp_path: Path) -> None:
    """Every exported function, with each of its allocations failing in turn, and with fewer threads than requested."""
    program, source = tmp_path / "no_memory", Path(__file__).parent / "no_memory.cc"
    command = [
        str(COMPILER),
        "-std=c++17",
        "-O1",
        "-w",
        "-pthread",
        "-rdynamic",
        f"-I{jax.ffi.include_dir()}",
    ]
    subprocess.run([*command, str(source), "-o", str(program), "-ldl"], check=True, timeout=120)
    result = subprocess.run([program, cpu.LIBRARY], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    refused = re.fullmatch(r"(\d+) calls refused\n", result.stdout)
    assert refused is not None, result.stdout
    assert int(refused.group(1)) > 50


@built
@linux
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")
def test_the_library_exports_exactly_what_python_looks_up(repository: Path) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", cpu.LIBRARY], capture_output=True, text=True, check=True
    )
    exported = {name for name in re.findall(r" (\S+)$", listed.stdout, re.MULTILINE) if "bitnet" in name}
    modules = (repository / "kernels" / "bitnet_kernels").glob("*.py")
    used = {name for module in modules for name in re.findall(r"\bbitnet_kernels_\w+", module.read_text())}
    assert exported == used


def test_every_header_has_an_include_guard(csrc: Path) -> None:
    headers = sorted(csrc.glob("*.h"))
    assert len(headers) > 20
    for header in headers:
        guard = f"BITNET_KERNELS_{header.stem.upper()}_H_"
        assert f"#ifndef {guard}\n#define {guard}\n" in header.read_text(), header.name


@compiles
@pytest.mark.slow
def test_the_sources_compile_without_warnings(csrc: Path) -> None:
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-isystem"]
    for source in sorted(csrc.glob("*.cc")):
        subprocess.run([*command, jax.ffi.include_dir(), str(source)], check=True, timeout=300)


def test_the_readme_lists_the_instruction_sets_of_the_dispatch_table(csrc: Path, readme: str) -> None:
    names = [row[0] for row in table(readme, "| name | needs |")]
    assert names == table_of_kernels(csrc)
    for name in names:
        assert (csrc / f"integer_matmul_{name}.cc").exists()


@built
def test_the_library_has_the_instruction_sets_of_the_dispatch_table(csrc: Path) -> None:
    assert set(cpu.known_isas()) <= set(table_of_kernels(csrc))
    assert [isa for isa in cpu.known_isas() if isa in cpu.available_isas()] == list(cpu.available_isas())
    assert cpu.known_isas()[0] == cpu.available_isas()[0] == "scalar"


def test_the_readme_lists_the_formats(readme: str) -> None:
    rows = {row[0]: row for row in table(readme, "| format | P |")}
    assert {name: (int(row[1]), int(row[2])) for name, row in rows.items()} == {
        name: (format.fields, format.block_k) for name, format in FORMATS.items()
    }
    pattern = r"up to 2\^(\d+) inputs a group \(int4 and uint4 2\^(\d+),\s+int8 2\^(\d+)\)"
    limits = re.search(pattern, readme)
    assert limits is not None
    most, of_four_bits, of_int8 = limits.groups()
    expected = (
        dict.fromkeys(FORMATS, most) | dict.fromkeys(("int4", "uint4"), of_four_bits) | {"int8": of_int8}
    )
    assert {name: 2 ** int(power) for name, power in expected.items()} == {
        name: format.max_inputs for name, format in FORMATS.items()
    }


def test_the_readme_lists_the_layouts(readme: str) -> None:
    rows = {row[0]: row for row in table(readme, "| layout | for |")}
    assert {name: row[1].lower() for name, row in rows.items()} == LAYOUTS
    for name, row in rows.items():
        having = {format for format in FORMATS if name in FORMATS[format].layouts}
        words = row[3]
        if words == "all":
            assert having == set(FORMATS)
        elif words.startswith("all but "):
            assert having == set(FORMATS) - set(words.removeprefix("all but ").split(" and "))
        else:
            assert having == set(words.split(", "))


def test_the_readme_lists_every_file_and_no_other(repository: Path, readme: str) -> None:
    tree = readme[readme.index("    bitnet_kernels/\n") : readme.index("## The packed formats")]
    patterns = set()
    for word in re.findall(r"[\w*{},]+\.(?:py|cc|h|\{h,cc\})", tree):
        parts = re.split(r"\{([^}]*)\}", word)
        names = [""]
        for i, part in enumerate(parts):
            names = [name + choice for name in names for choice in (part.split(",") if i % 2 else [part])]
        patterns.update(names)
    kernels = repository / "kernels"
    files = {*(kernels / "csrc").glob("*.*"), *(kernels / "bitnet_kernels").glob("*.py")}
    named = {pattern: [file for file in files if file.match(pattern)] for pattern in patterns}
    assert [pattern for pattern, found in named.items() if not found] == []
    assert files - {file for found in named.values() for file in found} == {
        kernels / "bitnet_kernels" / "__init__.py"
    }


def test_the_example_in_the_readme_runs(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert example is not None
    exec(compile(example.group(1), "kernels/README.md", "exec"), {})
    assert "Choice(name=" in capsys.readouterr().out


def test_the_steps_for_a_new_backend_name_existing_files(repository: Path, readme: str) -> None:
    backends = [name for name in matmul.IMPLEMENTATIONS if name in ("gpu", "tpu")]
    assert backends == ["gpu", "tpu"]
    for platform in backends:
        backend = matmul._pallas(platform)
        assert callable(backend.obstacle)
        assert callable(backend.scaled_matmuls)
        assert platform in LAYOUTS.values()
        assert platform in matmul._XLA_PLATFORM
    for page in (readme, (repository / "CONTRIBUTING.md").read_text()):
        for name in ("obstacle", "scaled_matmuls", "IMPLEMENTATIONS", "_XLA_PLATFORM", "LAYOUTS"):
            assert name in page
