"""The C++ arithmetic on processors that this machine is not, emulated by qemu where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILERS = {
    "x86_64": os.environ.get("CXX_X86_64") or shutil.which("x86_64-linux-gnu-g++"),
    "aarch64": os.environ.get("CXX_AARCH64") or shutil.which("aarch64-linux-gnu-g++"),
}


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
def test_every_instruction_set_is_exact(
    machine: str, processor: str, expected: list[str], repository: Path, tmp_path: Path
) -> None:
    compiler, emulator = COMPILERS[machine], shutil.which(f"qemu-{machine}")
    if compiler is None:
        pytest.skip(
            f"no compiler for {machine} (set CXX_{machine.upper()}, or install {machine}-linux-gnu-g++)"
        )
    if emulator is None:
        pytest.skip(f"no qemu-{machine} (Debian: apt install qemu-user)")
    folder = repository / "kernels" / "csrc"
    sources = [*folder.glob("integer_matmul_*.cc"), folder / "isa.cc", Path(__file__).parent / "exactness.cc"]
    program = tmp_path / "exactness"
    command = [compiler, "-std=c++17", "-O2", "-w", "-static", "-pthread", f"-I{folder}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=600)
    command = [emulator, "-cpu", processor, str(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == expected
    assert all(line.endswith(" 0 wrong") for line in result.stdout.splitlines()), result.stdout
