"""Several processes that train one run, on one or many machines.

Every process runs the same command and builds the same program over the devices of all of them (sharding.py). The first
process alone writes the run folder, except for the arrays of a checkpoint, of which each writes its part; so the folder
must be on a file system that all of them see. Decisions that depend on the outside world (what the folder holds, a
signal, a damaged checkpoint) are taken once and sent to all: processes that disagree would wait for each other forever.

With one process, every function here does the same without communication.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from bitnet_jax.names import check_name

LAUNCHES = ("single", "manual", "cluster")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Section `distributed`: the processes of a run. It does not affect what is computed, so it may change on resume.

    Raises:
      ValueError: an unknown `launch`, or fields that it does not use or lacks.
    """

    # single: this process alone; manual: the three fields below; cluster: found by JAX (Slurm, Open MPI, TPU pods)
    launch: str = "single"
    coordinator: str | None = None  # manual: host:port of the first process, with any free port
    processes: int | None = None  # manual: number of processes
    process: int | None = None  # manual: index of this process, from 0
    heartbeat_seconds: int = 100  # a process that is silent for this long is lost, and the others stop

    def __post_init__(self) -> None:
        check_name("distributed.launch", self.launch, LAUNCHES)
        for name in ("coordinator", "processes", "process"):
            value = getattr(self, name)
            if (value is not None) != (self.launch == "manual"):
                expected = "a value" if self.launch == "manual" else "no value"
                raise ValueError(
                    f"distributed.{name}: got {value} with distributed.launch={self.launch}, expected {expected}; "
                    "coordinator, processes and process belong to launch=manual"
                )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError(
                    f"distributed.coordinator: got {self.coordinator!r}, expected HOST:PORT, such as 10.0.0.1:1234"
                )
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise ValueError(
                f"distributed.process: got {self.process} of {self.processes} processes, expected 0 to "
                f"{self.processes - 1}"
            )
        if self.heartbeat_seconds < 1:
            raise ValueError(
                f"distributed.heartbeat_seconds: got {self.heartbeat_seconds}, expected at least 1"
            )


class OtherProcessFailed(RuntimeError):
    """Another process of the run failed. The message is a single line."""


def connect(config: DistributedConfig) -> None:
    """Connect this process with the others of the run. Must precede the first use of a device.

    Raises:
      ValueError: the processes cannot be connected; the message says why.
    """
    if config.launch == "single" or jax.distributed.is_initialized():
        return
    # Its handler of SIGTERM would replace ours, see interrupt.py.
    jax.config.update("jax_enable_preemption_service", False)
    given = {name: getattr(config, name) for name in ("coordinator", "processes", "process")}
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.processes,
            process_id=config.process,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            cluster_detection_method="deactivate" if config.launch == "manual" else None,
        )
    except Exception as error:  # a missing cluster, a port in use, a timeout: each raises its own type
        where = f"{given}" if config.launch == "manual" else "no cluster was found"
        raise ValueError(
            f"distributed: the processes could not be connected ({where}: {' '.join(str(error).split())[:300]}); "
            "check that all processes were started and that the coordinator can be reached"
        ) from error


def is_first() -> bool:
    """Whether this process writes the run folder and reports progress."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether the run has a single process."""
    return jax.process_count() == 1


def tell(line: str) -> None:
    """Print a line on stderr, once for all processes."""
    if is_first():
        print(line, file=sys.stderr)


def exchange(value: Any) -> list[Any]:
    """The JSON values that the processes passed, in their order."""
    if is_alone():
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(content)]))[:, 0]
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def everywhere(action: Callable[[], Any], *, only_first: bool = False) -> Any:
    """Call `action` in every process; if it raises in one of them, raise in all, so that none waits in vain.

    Args:
      only_first: call it in the first process alone, whose value (JSON) is returned in all.

    Raises:
      OtherProcessFailed: the action failed in another process.
    """
    value, error = None, None
    if is_first() or not only_first:
        try:
            value = action()
        except Exception as problem:
            error = problem
    if is_alone():
        if error is not None:
            raise error
        return value
    failed = None if error is None else " ".join(str(error).split()) or type(error).__name__
    answers = exchange({"failed": failed, "value": value if only_first else None})
    if error is not None:
        raise error
    for process, answer in enumerate(answers):
        if answer["failed"] is not None:
            raise OtherProcessFailed(f"process {process}: {answer['failed']}")
    return answers[0]["value"] if only_first else value


class AnyProcess:
    """Whether a flag is set in some process.

    With several processes the answer is that to the previous call, the same in all: the devices combine the flags of a
    call while the next update runs, and nobody waits for them.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._asked: Bool[Array, ""] | None = None

    def __call__(self, flag: bool) -> bool:
        if is_alone():
            return flag
        before = self._asked
        axes = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        flags = jax.make_array_from_callback((self._mesh.size,), axes, lambda index: np.array([flag]))
        self._asked = _any(self._mesh)(flags)
        return before is not None and bool(before)


@functools.lru_cache(maxsize=4)
def _any(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))


def lost_process(error: Exception) -> OtherProcessFailed:
    """The error of an update whose communication failed."""
    return OtherProcessFailed(
        f"an update failed, probably because another process has stopped ({' '.join(str(error).split())[:200]}); see "
        "the output of the others, then start all of them again to resume from the last checkpoint"
    )
