"""The C++ custom calls alone: operands that Python never passes and failed allocations are errors, not crashes."""

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

from bitnet_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")

F32, I8, I32, U8, BF16 = jnp.float32, jnp.int8, jnp.int32, jnp.uint8, jnp.bfloat16


def call(target: str, results: object, *operands: jax.Array, **attributes: object) -> object:
    return jax.block_until_ready(
        jax.ffi.ffi_call(f"bitnet_kernels_{target}", results)(*operands, isa="scalar", **attributes)
    )


def result(shape: tuple[int, ...], dtype: object = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# XLA drops a call whose results are all empty, so each of these has a non-empty result beside the empty one.
@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize(("n", "k"), [(0, 64), (16, 0), (0, 0)])
def test_empty_matrices_are_rejected(m: int, n: int, k: int) -> None:
    whole, empty = jnp.zeros((1, k // 32, 64), U8), jnp.zeros((n // 16, k // 32, 64), U8)
    scale, x, table = jnp.ones((1, 1), F32), jnp.zeros((m, k), F32), jnp.zeros((n, k), BF16)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="expected at least one scale group, output and input"
    ):
        call(
            "scaled_matmul", (result((m, 16)), result((m, n))), x, whole, scale, empty, scale,
            formats=np.zeros(2, np.int64), activation_bits=np.int64(8),
        )  # fmt: skip
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected at least one output and input"):
        call(
            "exact_top_logits", (result((m, n)), result((m,), I32)), x, table, jnp.zeros((2 * m, k), I8),
            jnp.zeros(m, F32), jnp.zeros((2 * m, n), I32), jnp.zeros(n, F32), jnp.zeros((2, n), F32), top=np.int64(1),
        )  # fmt: skip


# Allocations of 7 x 1021 bytes fail: the codes of x below.
NO_MEMORY = """
#include <cstdlib>
#include <new>
void* operator new(std::size_t size) {
  if (size == 7 * 1021) throw std::bad_alloc();
  return std::malloc(size ? size : 1);
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
"""
WITHOUT_MEMORY = """
import jax, jax.numpy as jnp, numpy as np
from bitnet_kernels import pack, packed_matmul
w = pack(np.ones((16, 1021), np.int8), np.ones((1, 1), np.float32), "binary")
for rows in (7, 6):
    try:
        print(float(packed_matmul(jnp.ones((rows, 1021)), w, implementation="cpu")[0, 0]))
    except jax.errors.JaxRuntimeError as error:
        print(error)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the failing allocator with")
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is of Linux")
def test_a_failed_allocation_is_an_error_and_the_process_continues(tmp_path: Path) -> None:
    (tmp_path / "new.cc").write_text(NO_MEMORY)
    library = tmp_path / "new.so"
    command = ["g++", "-O1", "-w", "-shared", "-fPIC", str(tmp_path / "new.cc"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", WITHOUT_MEMORY]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    lines = result.stdout.splitlines()
    assert lines == ["RESOURCE_EXHAUSTED: bitnet_kernels: out of memory", "1021.0"], result.stderr[-2000:]
