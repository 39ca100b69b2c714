"""Weights on huge pages: the same arrays, in the memory that was asked for."""

from __future__ import annotations

import mmap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bitnet_jax.packed import huge_pages
from bitnet_jax.packed.huge_pages import on_huge_pages
from bitnet_kernels.random_packed import random_packed

granted = pytest.mark.skipif(huge_pages.unavailable() is not None, reason=f"{huge_pages.unavailable()}")


@granted
def test_every_array_is_the_same_and_lies_in_the_memory() -> None:
    variables = {
        "packed": {"weight": random_packed("ternary2", (64, 256))},
        "params": {
            "norm": jnp.arange(7.0),
            "one": jnp.zeros((), jnp.int8),
            "half": jnp.ones(3, ml_dtypes.bfloat16),
        },
    }
    copied = on_huge_pages(variables)
    begin = copied.memory.ctypes.data
    assert begin % huge_pages.PAGE == 0
    for leaf, source in zip(jax.tree.leaves(copied.variables), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(leaf, source)
        assert begin <= leaf.unsafe_buffer_pointer() < begin + copied.memory.nbytes
        assert leaf.unsafe_buffer_pointer() % huge_pages.ALIGNMENT == 0
    assert copied.variables["packed"]["weight"].format == "ternary2"


@granted
def test_large_arrays_get_huge_pages() -> None:
    copied = on_huge_pages({"a": jnp.ones(16 << 20, jnp.int8)})
    begin, huge = copied.memory.ctypes.data, 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(address, 16) for address in words[0].split("-"))
            inside = first <= begin < last
        elif inside and words[0] == "AnonHugePages:":
            huge = int(words[1])
    assert huge >= 8 << 10  # KiB; memory may be too fragmented for all of them


def test_a_system_without_them_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "enabled")
    with pytest.raises(ValueError, match=r"got a request for huge pages, .*\[never\]"):
        on_huge_pages({})
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    with pytest.raises(ValueError, match="MADV_HUGEPAGE"):
        on_huge_pages({})
