"""The C++ arithmetic and threads under the sanitizers of the compiler, where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (set CXX, or install g++)")
@pytest.mark.parametrize("program", ["exactness.cc", "sanitize.cc"])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_nothing_is_found(program: str, sanitizer: str, repository: Path, tmp_path: Path) -> None:
    folder = repository / "kernels" / "csrc"
    sources = [
        *folder.glob("integer_matmul_*.cc"),
        *(folder / f"{name}.cc" for name in ("isa", "lookahead", "scaled_matmul", "threads")),
    ]
    sources.append(Path(__file__).parent / program)
    flags = ["-std=c++17", "-O1", "-g", "-w", "-ffp-contract=off", "-pthread", f"-I{folder}"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    built = tmp_path / "program"
    subprocess.run([str(COMPILER), *flags, *map(str, sources), "-o", str(built)], check=True, timeout=600)
    result = subprocess.run([str(built)], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this kernel's address randomization is too wide for the compiler's thread sanitizer")
    assert result.returncode == 0, result.stderr[-3000:]
    assert " 0 wrong" in result.stdout
