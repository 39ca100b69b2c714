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
    families = ("integer_matmul_*.cc", "attention*.cc", "head*.cc")
    sources = {folder / f"{name}.cc" for name in ("isa", "lookahead", "sign_matmul", "threads")}
    sources = sorted(sources.union(*map(folder.glob, families)))
    # Without contraction, as setup.py builds them: what is fused is written as such.
    flags = ["-std=c++17", "-O2", "-w", "-ffp-contract=off", "-pthread", f"-I{folder}"]
    objects = [str(tmp_path / f"{source.stem}.o") for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        subprocess.run([compiler, *flags, "-c", str(source), "-o", compiled], check=True, timeout=600)
    for name in ("exactness", "float_exactness"):
        program, source = str(tmp_path / name), str(Path(__file__).parent / f"{name}.cc")
        command = [compiler, *flags, "-static", source, *objects, "-o", program]
        subprocess.run(command, check=True, timeout=600)
        command = [emulator, "-cpu", processor, program]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        assert [line.split(":")[0] for line in result.stdout.splitlines()] == expected
        assert all(line.endswith(" 0 wrong") for line in result.stdout.splitlines()), result.stdout
