"""keep_freed_memory: a later step takes no fresh pages from the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from bitnet_jax.training.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
step = jax.jit(lambda x: ((x @ x.T) @ x).sum())  # with a temporary array of 64 MB
x = jnp.ones((4096, 16))
for _ in range(10):  # until the heap has room for the arrays of two steps: one is freed while the next begins
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_a_step_faults_in_no_fresh_pages() -> None:
    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("keep") < 100 < 10_000 < faults("default")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet_jax.training.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
