"""Placement constraints apply only with a mesh in context."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from bitnet_jax.nn.placement import split_by_rows, split_over_tokens


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


X = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize("place", [split_over_tokens, split_by_rows])
def test_placement_is_a_no_op_without_a_mesh(place: Callable[[jax.Array], jax.Array]) -> None:
    x = jnp.asarray(X)
    assert place(x) is x
    assert "sharding" not in str(jax.make_jaxpr(place)(X))


def test_a_batch_is_sharded_where_it_divides(mesh: Mesh) -> None:
    with jax.set_mesh(mesh):
        split = jax.jit(split_over_tokens)(X)
        odd = jax.jit(split_over_tokens)(X[:3])
    assert split.addressable_shards[0].data.shape == (2, 3)
    assert odd.addressable_shards[0].data.shape == (3, 3)
    np.testing.assert_array_equal(split, X)


def test_embedding_rows_are_gathered(mesh: Mesh) -> None:
    columns = jax.device_put(X[:, :2], jax.NamedSharding(mesh, P(None, "fsdp")))
    assert columns.addressable_shards[0].data.shape == (4, 1)
    with jax.set_mesh(mesh):
        assert jax.jit(split_by_rows)(columns).addressable_shards[0].data.shape == (4, 2)


def test_placement_is_a_no_op_inside_shard_map(mesh: Mesh) -> None:
    with jax.set_mesh(mesh):
        y = jax.jit(jax.shard_map(split_over_tokens, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp")))(X)
    np.testing.assert_array_equal(y, X)
