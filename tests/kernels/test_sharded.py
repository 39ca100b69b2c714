"""Products over several (virtual) devices: same values as on one device, and no packed bytes are transferred."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from bitnet_kernels import FORMATS, packed_matmul, reference, relayout
from bitnet_kernels.sharded import sharded_matmul, specs

# XLA multiplies the layout of another platform here
pytestmark = pytest.mark.filterwarnings("ignore:packed_matmul runs on XLA")


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))


def placed(w, mesh, split):
    """w with its intended sharding."""
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, w, specs(w, "d", split))


@pytest.mark.extended(after=4)
@pytest.mark.parametrize("split", ["outputs", "inputs"])
@pytest.mark.parametrize(
    ("format", "layout"),
    [(f, layout) for f in ("binary", "ternary2", "int8") for layout in FORMATS[f].layouts],
)
def test_values_equal_those_of_one_device_and_weights_are_not_gathered(
    make_packed, mesh, format, layout, split
) -> None:
    _, w = make_packed(format, 256, 1024)
    w = relayout(w, layout)
    x = jax.random.normal(jax.random.key(0), (5, 1024))
    multiply = jax.jit(functools.partial(sharded_matmul, mesh=mesh, axis="d", split=split))
    compiled = multiply.lower(x, on_devices := placed(w, mesh, split)).compile()
    np.testing.assert_array_equal(compiled(x, on_devices), packed_matmul(x, w, implementation="reference"))
    text = compiled.as_text()
    moved = re.findall(r"= (\w+)\[.*? (all-gather|all-to-all|collective-permute)\(", text)
    assert "u8" not in {dtype for dtype, _ in moved}
    assert ("all-reduce" in text) == (split == "inputs")
    if split == "outputs":
        assert not moved


@pytest.mark.parametrize("split", ["outputs", "inputs"])
def test_scale_groups(make_packed, mesh, split: str) -> None:
    _, w = make_packed("ternary2", 64, 512, groups=4)
    x = jax.random.normal(jax.random.key(0), (5, 512))
    y = sharded_matmul(x, placed(w, mesh, split), mesh, "d", split)
    # each device sums its own groups first
    np.testing.assert_allclose(y, packed_matmul(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [16, None])
@pytest.mark.parametrize("format", ["ternary2", "uint4"])
@pytest.mark.parametrize("split", ["outputs", "inputs"])
def test_inputs_that_are_not_rounded_to_8_bits(
    make_packed, mesh, split: str, format: str, bits: int | None
) -> None:
    _, w = make_packed(format, 64, 512)
    x = jax.random.normal(jax.random.key(0), (5, 512))
    y = sharded_matmul(x, placed(w, mesh, split), mesh, "d", split, activation_bits=bits)
    # each device sums its own inputs first: 512 terms of magnitude 15 for uint4
    np.testing.assert_allclose(y, packed_matmul(x, w, activation_bits=bits), rtol=1e-5, atol=1e-3)
    rounded = packed_matmul(x, w)
    assert np.abs(y - rounded).max() > 10 * np.abs(y - packed_matmul(x, w, activation_bits=bits)).max()


def test_the_kernel_for_tpus_under_shard_map(make_packed, mesh) -> None:
    from bitnet_kernels import pallas_tpu

    _, w = make_packed("ternary2", 256, 512)
    w, x = relayout(w, "column"), jnp.ones((5, 512), jnp.int8)

    def part(x, codes, scale):
        local = type(w)(codes, scale, w.format, w.layout, (128, 512))
        return pallas_tpu.scaled_matmul(x, local, interpret=True)

    spec = specs(w, "d", "outputs")
    P = jax.sharding.PartitionSpec
    on_devices = jax.shard_map(
        part, mesh=mesh, in_specs=(P(), spec.codes, spec.scale), out_specs=P(None, "d"), check_vma=False
    )
    np.testing.assert_array_equal(jax.jit(on_devices)(x, w.codes, w.scale), reference.scaled_matmul(x, w))


def test_errors_name_parts_that_are_not_whole_blocks(make_packed, mesh) -> None:
    _, w = make_packed("ternary2", 40, 96)
    x = jnp.ones((1, 96))
    with pytest.raises(
        ValueError, match="40 outputs of a ternary2 matrix in layout panel16 on 2 devices; expected"
    ):
        sharded_matmul(x, w, mesh, "d", "outputs")
    with pytest.raises(ValueError, match="split='rows'; expected one of"):
        sharded_matmul(x, w, mesh, "d", "rows")
    _, w = make_packed("ternary2", 32, 96, groups=3)
    with pytest.raises(ValueError, match="3 groups of inputs on 2 devices"):
        sharded_matmul(x, w, mesh, "d", "inputs")
