"""Many custom calls at once: none may wait for a thread that waits for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitnet_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")

# 16 independent products, each large enough to ask XLA's pool for helpers. In a process of its own, since a
# deadlock hangs it.
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


def test_independent_calls_in_one_program_and_from_many_threads() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CONCURRENT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.stdout.split() == ["8"], result.stderr[-2000:]
