"""One run on several devices: the mesh, and the shardings of state and batch.

The program is written for global arrays; shardings place them, and XLA inserts the communication. So scales and
statistics of a matrix are those of the global matrix, however it is sharded.

    data     replicates the model; splits the batch
    fsdp     splits the batch too; parameters and optimizer state are sharded and gathered where they are used, those of
             quantized layers as packed codes (nn/packed_gather.py)
    context  splits the tokens of each sequence; keys and values are gathered for attention (nn/context.py)
    tensor   splits every layer: outputs of q, k, v, gate, up and the heads, inputs of o and down

The devices are those of all processes of the run (distributed.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from bitnet_jax.models.stacked import is_stacked
from bitnet_jax.nn.placement import AXES, BATCH_AXES, matrix_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Section `mesh`: devices along each axis. It does not affect what is computed, so it may change on resume.

    Raises:
      ValueError: an axis with fewer than one device.
    """

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ValueError(f"mesh.{name}: got {size}, expected at least 1 device")

    @property
    def batch_parts(self) -> int:
        """Number of parts a batch is split into."""
        return self.data * self.fsdp

    @property
    def devices(self) -> int:
        return math.prod(dataclasses.astuple(self))

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())
        return f"{sizes}, which is {self.devices} devices"


def check_context(parts: int, task: str, length: int, model: Mapping[str, Any], relations: float) -> None:
    """Whether the sequences of a run can be split into `parts`.

    Args:
      task, length, model, relations: config.task, data.length, the section model, distillation.relations.

    Raises:
      ValueError: they cannot.
    """
    if parts == 1:
        return
    if task == "images":
        raise ValueError(
            f"mesh.context: got {parts} for task 'images', whose inputs are not sequences of tokens; use mesh.data"
        )
    if length % parts:
        raise ValueError(
            f"mesh.context: got {parts}, expected a divisor of data.length={length}; change one of them"
        )
    if relations:
        raise ValueError(
            f"mesh.context: got {parts} with distillation.relations, which compares all tokens with all; remove one"
        )
    if model.get("attention") == "linear" and model.get("causal", True):
        raise ValueError(
            f"mesh.context: got {parts} with causal model.attention 'linear', whose state passes from token to token; "
            "use mesh.data"
        )


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The first devices (default: of all devices) as a mesh with the axes data, fsdp, context and tensor.

    Raises:
      ValueError: fewer devices than the config requires, or with several processes also more: each takes part with all
        its devices.
    """
    devices = jax.devices() if devices is None else devices
    if (needed := config.devices) > len(devices):
        raise ValueError(
            f"mesh: got {config}, expected at most the {len(devices)} available ({devices[0].platform}); use "
            f"fewer, or try it with JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    if (processes := jax.process_count()) > 1 and needed < len(devices):
        raise ValueError(
            f"mesh: got {config}, expected all {len(devices)} devices of the {processes} processes; raise mesh.data "
            "or mesh.fsdp, or start fewer processes"
        )
    sizes = dataclasses.astuple(config)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def partition_spec(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """The partitioning of a parameter or its optimizer moments: matrices only, along axes that divide evenly.

    Args:
      path: names joined by "/", ending in `<linear or table>/<parameter>`; the rest only tells whether there is a
        leading axis of stacked layers, which is not split.
      sizes: devices along each axis of the mesh.
    """
    stacked = is_stacked(path)
    if len(shape) != 2 + stacked:
        return PartitionSpec()
    layer = path.split("/")[-2:][0]
    split = (
        axis if size % sizes[axis] == 0 else None
        for axis, size in zip(matrix_axes(layer), shape[stacked:], strict=True)
    )
    return PartitionSpec(*(None,) * stacked, *split)


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """The sharding of every leaf of a TrainState (of arrays or shapes).

    Paths of optimizer moments end like those of their parameters, so `partition_spec` shards both alike.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch: first axis over data and fsdp.

    Every device of context has all tokens of its sequences, which are few bytes, and takes its own (nn/context.py).
    """
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_batch(batch: Callable[..., Mapping[str, Any]], size: int, mesh: Mesh) -> dict[str, Array]:
    """The arrays of a batch on the devices of a mesh. Of several processes each reads only the rows of its devices.

    Args:
      batch: returns the arrays of the whole batch, or of the range of rows given as `rows`.
      size: B, the rows of the whole batch.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch()), sharding)
    indices = sharding.addressable_devices_indices_map((size,)).values()
    ranges = [index[0].indices(size) for index in indices if index is not None]
    first, last = min(start for start, _, _ in ranges), max(stop for _, stop, _ in ranges)

    def place(rows: np.ndarray) -> Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # no device lacks rows
            start, stop, _ = index[0].indices(size)
            return rows[start - first : stop - first]

        return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, part)

    return {name: place(np.asarray(array)) for name, array in batch(rows=slice(first, last)).items()}


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """ShapeDtypeStructs with shardings, for restoring and ahead-of-time compilation."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def needs_synchronous_dispatch(mesh: Mesh) -> bool:
    """Whether each update must finish before the next is dispatched.

    Overlapping updates on the virtual devices of a CPU deadlock: seen in jax 0.10.2 and 0.11.2, where
    `jax_cpu_enable_async_dispatch=False` did not help.
    """
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
