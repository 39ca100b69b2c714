"""Checksums of arrays: every change is seen, and parts add up to the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bitnet_jax.training.checksums import block_sum, checksums
from bitnet_jax.training.sharding import MeshConfig, make_mesh


def whole(array: np.ndarray) -> int:
    return block_sum(array, [0] * array.ndim)


def test_the_sum_is_the_formula() -> None:
    """Pinned: a checkpoint must be readable by later versions."""

    def weight(axis: int, index: int) -> int:
        mixed = (index + (axis << 48) + 1) * 0x9E3779B97F4A7C15 % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return (mixed ^ (mixed >> 31)) | 1

    array = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    words = array.view(np.uint32)
    expected = sum(int(words[i, j]) * weight(0, i) * weight(1, j) for i in range(3) for j in range(5))
    assert whole(array) == expected % 2**64
    assert whole(np.array(1.5, np.float32)) == 0x3FC00000


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16, np.uint8, np.bool_])
def test_every_flipped_bit_and_every_swap_changes_the_sum(dtype: np.dtype) -> None:
    rng = np.random.default_rng(1)
    array = rng.integers(0, 2, (4, 3, 2)).astype(dtype)
    before, flat = whole(array), array.view(np.uint8).reshape(-1)
    for position in range(flat.size):
        flat[position] ^= 1 << rng.integers(8) if dtype != np.bool_ else 1
        changed = whole(array)
        assert changed != before
        before = changed
    assert whole(array[::-1]) != before
    assert whole(array[:, ::-1]) != before


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(2).standard_normal((6, 8)).astype(np.float32)
    parts = [(0, 0), (0, 5), (2, 0), (2, 5)]
    blocks = [array[r : {0: 2, 2: 6}[r], c : {0: 5, 5: 8}[c]] for r, c in parts]
    total = sum(block_sum(block, list(start)) for block, start in zip(blocks, parts, strict=True))
    assert total % 2**64 == whole(array)
    monkeypatch.setattr("bitnet_jax.training.checksums.BLOCK", 16)  # two rows at a time
    assert total % 2**64 == whole(array)


def test_the_sum_does_not_depend_on_the_sharding() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2))
    array = jnp.arange(24.0).reshape(4, 6)
    alone = checksums({"x": array, "count": jnp.int32(7)})
    for spec in (PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")):
        placed = jax.device_put({"x": array, "count": jnp.int32(7)}, NamedSharding(mesh, PartitionSpec()))
        placed["x"] = jax.device_put(array, NamedSharding(mesh, spec))
        assert checksums(placed) == alone
