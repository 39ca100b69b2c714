"""One run on several devices: the mesh, and which part of a state or batch lies where.

Arrays stay whole to the program: it says what is computed, a sharding says where, and XLA inserts the
communication. So scales and statistics of a matrix are those of the whole matrix, whatever it is split into.

    data     copies of everything, each with its part of the batch
    fsdp     parts of the batch too; parameters and optimizer state are split and gathered where they are used
    tensor   parts of every layer: outputs of q, k, v, gate, up and the heads, inputs of o and down

One process with all its devices; several processes are not supported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from bitnet_jax.nn.placement import AXES, BATCH_AXES, FSDP, TENSOR

# Their inputs are what a layer split by outputs made, so that only their sums cross devices (1909.08053).
SPLIT_BY_INPUTS = ("o_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Section `mesh`: devices along each axis. It says where a run is computed, not what: a run may go on with
    another one.

    Raises:
      ValueError: an axis without a device.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ValueError(f"mesh.{name}: got {size}, expected at least 1 device")

    @property
    def batch_parts(self) -> int:
        """Into how many parts a batch is split."""
        return self.data * self.fsdp


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The first devices (of all there are, by default) as a mesh with the axes data, fsdp and tensor.

    Raises:
      ValueError: fewer devices than the config asks for.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.astuple(config)
    if (needed := math.prod(sizes)) > len(devices):
        raise ValueError(
            f"mesh: got data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}, which is {needed} devices, "
            f"expected at most the {len(devices)} there are ({devices[0].platform}); ask for fewer, or try it with "
            f"JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def partition_spec(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """How a parameter, or an optimizer moment of it, is split: only matrices are, and only by what divides them.

    Args:
      path: names joined by "/", the last two of them `<linear or table>/<parameter>`; others do not matter.
      sizes: devices along each axis of the mesh.
    """
    if len(shape) != 2:
        return PartitionSpec()
    layer = path.split("/")[-2:][0]
    axes = (FSDP, TENSOR) if layer in SPLIT_BY_INPUTS else (TENSOR, FSDP)
    return PartitionSpec(
        *(axis if size % sizes[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    )


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """The sharding of every leaf of a TrainState (of arrays or shapes).

    `partition_spec` looks at the end of a path only, so optimizer moments lie where their parameters do.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch: the first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """ShapeDtypeStructs that also say where their arrays lie, as restoring and compiling ahead want them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def must_wait(mesh: Mesh) -> bool:
    """Whether each update must be over before the next is given to the devices.

    Updates that overlap on the virtual devices of a CPU wait for each other forever: seen in jax 0.10.2 and
    0.11.2, where `jax_cpu_enable_async_dispatch=False` did not help.
    """
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
