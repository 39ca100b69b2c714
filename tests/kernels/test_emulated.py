"""The C++ arithmetic on other processors, emulated by qemu or Bochs where they are installed."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernels import bochs

COMPILERS = {
    "x86_64": os.environ.get("CXX_X86_64") or shutil.which("x86_64-linux-gnu-g++"),
    "aarch64": os.environ.get("CXX_AARCH64") or shutil.which("aarch64-linux-gnu-g++"),
}


PROGRAMS = ("exactness", "float_exactness", "training_exactness")


def check(output: str, expected: list[str]) -> None:
    """What a program printed: a line for each instruction set, nothing wrong."""
    lines = output.splitlines()
    assert [line.split(":")[0] for line in lines] == expected, output
    assert all(line.endswith(" 0 wrong") for line in lines), output


@pytest.fixture(scope="module")
def programs(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """machine -> its PROGRAMS, compiled once."""

    @functools.cache
    def compiled(machine: str) -> list[Path]:
        compiler, place = COMPILERS[machine], tmp_path_factory.mktemp(machine)
        assert compiler is not None
        folder = repository / "kernels" / "csrc"
        sources = [source for source in folder.glob("*.cc") if not source.name.startswith("ffi")]
        # As in setup.py: fused operations with a single rounding are explicit.
        command = [compiler, "-std=c++17", "-O3", "-w", "-ffp-contract=off", "-pthread", f"-I{folder}"]
        objects = []
        for source in sources:
            objects.append(str(place / f"{source.stem}.o"))
            subprocess.run([*command, "-c", str(source), "-o", objects[-1]], check=True, timeout=600)
        for name in PROGRAMS:
            source = Path(__file__).parent / f"{name}.cc"
            linked = [*command, "-static", str(source), *objects, "-o", str(place / name)]
            subprocess.run(linked, check=True, timeout=600)
        return [place / name for name in PROGRAMS]

    return compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "processor", "expected"),
    [
        ("x86_64", "Nehalem", ["scalar"]),
        ("x86_64", "Haswell", ["scalar", "avx2"]),
        ("aarch64", "cortex-a53", ["scalar"]),
        ("aarch64", "neoverse-n1", ["scalar", "neon"]),
        ("aarch64", "max", ["scalar", "neon", "i8mm"]),
    ],
)
def test_every_emulated_instruction_set_is_exact(
    machine: str, processor: str, expected: list[str], programs: Callable[[str], list[Path]]
) -> None:
    emulator = shutil.which(f"qemu-{machine}")
    if COMPILERS[machine] is None:
        pytest.skip(
            f"no compiler for {machine} (set CXX_{machine.upper()}, or install {machine}-linux-gnu-g++)"
        )
    if emulator is None:
        pytest.skip(f"no qemu-{machine} (Debian: apt install qemu-user)")
    for program in programs(machine):
        command = [emulator, "-cpu", processor, str(program)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        check(result.stdout, expected)


AVX512 = ["avx512vnni", "avx512lookup", "avx512vbmi"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("tigerlake", ["scalar", "avx2", *AVX512]),
        ("sapphire_rapids", ["scalar", "avx2", "avxvnni", *AVX512]),  # Bochs 3
    ],
)
def test_avx512_is_exact_in_an_emulated_machine(
    processor: str, expected: list[str], programs: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    compiler, obstacle = COMPILERS["x86_64"], bochs.obstacle(processor)
    if obstacle or compiler is None:
        pytest.skip(obstacle or "no compiler for x86_64 (set CXX_X86_64, or install x86_64-linux-gnu-g++)")
    init, source = tmp_path / "init", Path(__file__).parent / "init.cc"
    command = [compiler, "-std=c++17", "-O2", "-static", str(source), "-o", str(init)]
    subprocess.run(command, check=True, timeout=600)
    results = bochs.run(programs("x86_64"), init, processor, tmp_path / "machine", timeout=3600)
    for status, output in results.values():
        assert status == 0, output
        check(output, expected)
