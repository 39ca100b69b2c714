"""The threads of the C++ kernels: no deadlock, results independent of their number, and fork safety."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import FORMATS, bench, cpu, packed_matmuls

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")

# 16 independent products, each large enough to request helpers from XLA's pool. In a separate process, since a
# deadlock would hang it.
CONCURRENT = """
import threading
import numpy as np, jax, jax.numpy as jnp
from bitnet_kernels import pack, packed_matmul
random = np.random.default_rng(0)
codes = random.integers(-1, 2, (16, 2048, 2048), np.int8)
matrices = [pack(c, np.ones((1, 1), np.float32), "ternary2") for c in codes]
x = random.integers(-128, 128, (3, 2048), np.int8)
expected = np.einsum("mk,lnk->lmn", x.astype(np.float32), codes.astype(np.float32))

@jax.jit
def independent(x, matrices):
    return [packed_matmul(x, w) for w in matrices]

def check(rows):
    for _ in range(5):
        got = independent(jnp.asarray(x[:rows]), matrices)
        np.testing.assert_array_equal(np.stack(got), expected[:, :rows])
    passed.append(rows)

passed = []
check(1)
check(3)
threads = [threading.Thread(target=check, args=(1 + 2 * (i % 2),)) for i in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(passed))
"""


def test_concurrent_calls_in_one_program_and_from_many_threads() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CONCURRENT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.stdout.split() == ["8"], result.stderr[-2000:]


def test_results_do_not_depend_on_the_number_of_threads_or_rows(make_packed) -> None:
    matrices = [make_packed(format, 1000, 1024, 2)[1] for format in FORMATS]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 1024)), jnp.float32)
    multiply = jax.jit(lambda x: packed_matmuls(x, matrices))
    expected = np.stack(multiply(x))
    try:
        for count in (1, 2, 3, 8):
            cpu.set_thread_count(count)
            np.testing.assert_array_equal(np.stack(multiply(x)), expected)
            for row in range(len(x)):
                np.testing.assert_array_equal(np.stack(multiply(x[row : row + 1]))[:, 0], expected[:, row])
    finally:
        cpu.set_thread_count(bench.threads())
    with pytest.raises(ValueError, match="count=0; expected at least one thread"):
        cpu.set_thread_count(0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the check with")
def test_the_parallel_loop_alone(repository: Path, tmp_path: Path) -> None:
    """Every item exactly once: from many callers, with any number of threads, sleeping or not, and after a fork."""
    program, csrc = tmp_path / "threads", repository / "kernels" / "csrc"
    sources = [
        str(csrc / "lookahead.cc"),
        str(csrc / "threads.cc"),
        str(Path(__file__).parent / "threads.cc"),
    ]
    subprocess.run(["g++", "-std=c++17", "-O2", "-pthread", f"-I{csrc}", *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
