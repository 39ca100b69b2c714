"""The C++ arithmetic and threads under compiler sanitizers, where available."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-w", "-ffp-contract=off", "-pthread", "-fno-sanitize-recover=all"]
SANITIZERS = {
    # Checks for null references and use after scope, applied to every captured variable of the inlined bodies
    # of the kernels, they make the compiler run for ten minutes.
    "address,undefined": ["-fno-sanitize=null", "-fno-sanitize-address-use-after-scope"],
    "thread": [],
}


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (set CXX, or install g++)")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_sanitizers_report_nothing_for_the_arithmetic(
    sanitizer: str, repository: Path, tmp_path: Path
) -> None:
    folder = repository / "kernels" / "csrc"
    compiler = [str(COMPILER), *FLAGS, f"-I{folder}", f"-fsanitize={sanitizer}", *SANITIZERS[sanitizer]]
    sources = [source for source in folder.glob("*.cc") if not source.name.startswith("ffi")]
    objects = [str(tmp_path / f"{source.stem}.o") for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        subprocess.run([*compiler, "-c", str(source), "-o", compiled], check=True, timeout=300)
    for name in ("exactness", "sanitize", "float_exactness", "training_exactness"):
        program = str(tmp_path / name)
        source = str(Path(__file__).parent / f"{name}.cc")
        subprocess.run([*compiler, source, *objects, "-o", program], check=True, timeout=300)
        result = subprocess.run([program], capture_output=True, text=True, timeout=600)
        if "unexpected memory mapping" in result.stderr:
            pytest.skip("this kernel's address randomization is too wide for the compiler's thread sanitizer")
        assert result.returncode == 0, result.stderr[-3000:]
        assert " 0 wrong" in result.stdout


@pytest.mark.extended
@pytest.mark.slow(after=2)  # a compilation each
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (set CXX, or install g++)")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", ["threads", "failures"])
def test_the_sanitizers_report_nothing_for_the_parallel_loop(
    name: str, sanitizer: str, repository: Path, tmp_path: Path
) -> None:
    folder, program = repository / "kernels" / "csrc", str(tmp_path / name)
    sources = [folder / f"{source}.cc" for source in ("lookahead", "threads")]
    compiler = [str(COMPILER), *FLAGS, f"-I{folder}", f"-fsanitize={sanitizer}"]
    command = [
        *compiler,
        *map(str, sources),
        str(Path(__file__).parent / f"{name}.cc"),
        "-o",
        program,
        "-ldl",
    ]
    subprocess.run(command, check=True, timeout=300)
    # They deliberately fork with helper threads running, and leak what the helpers may still read.
    environment = os.environ | {"TSAN_OPTIONS": "die_after_fork=0", "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([program], capture_output=True, text=True, timeout=300, env=environment)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this kernel's address randomization is too wide for the compiler's thread sanitizer")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr[-3000:]
