"""What devices send each other in a compiled program, read from its text: operations, types, bytes.

Bytes that a device receives in an operation on n devices, R being those of its result, are the least that it takes:

    all-gather, all-to-all      R (n - 1) / n      the parts of the others
    reduce-scatter              R (n - 1)          the part of the sum that the device keeps, from each of the others
    all-reduce                  2 R (n - 1) / n    a reduce-scatter, then an all-gather
    collective-permute          R
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?(?P<instruction>[\w.\-]+) = (?P<shape>\S.*?) "
    r"(?P<operation>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<part>-start|-done)?\((?:[^()]*[ (])?%?(?P<operand>[\w.\-]*)"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_LOOP = re.compile(r"condition=%?(?P<condition>[\w.\-]+), body=%?(?P<body>[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIMIT = re.compile(r"constant\((\d+)\)")
_PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)", re.MULTILINE)
# Groups of devices, as XLA writes them: {{0,1},{2,3}}; [groups,devices]<=[4]; the axes of a mesh, whole or in part.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\(.*?\))? \{(?P<axes>[^}]*)\}")


class Collective(NamedTuple):
    """An array that results from a collective operation, on one device."""

    operation: str
    dtype: str  # XLA's name, such as f32
    shape: tuple[int, ...]
    times: int  # in one execution of the program
    bytes: int
    received: float  # bytes that the device receives each time


def collectives(hlo: str) -> list[Collective]:
    """Of one execution of a compiled program, in no particular order.

    An operation in a loop counts as often as the loop runs, and one in a branch as if it were taken. An all-reduce of
    which a device keeps a part, which is how the TPU compiler writes some, is a reduce-scatter, with the bytes before
    the reduction.

    Raises:
      ValueError: a loop whose number of iterations is not in the text.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            name = found["name"]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    partitions = _PARTITIONS.search(hlo)
    everyone = int(partitions[1]) if partitions else 1
    found_all: list[Collective] = []

    def add(computation: str, times: int) -> None:
        started: dict[str, int] = {}  # an asynchronous operation -> its devices
        fused = computation.startswith("all-reduce-scatter")
        for line in bodies.get(computation, ()):
            if match := _COLLECTIVE.search(line):
                if match["part"] == "-start":  # its result holds operands and semaphores too
                    started[match["instruction"]] = _devices(line, everyone)
                    continue
                devices = started.get(match["operand"]) or _devices(line, everyone)
                operation = "all-reduce-scatter" if fused else match["operation"]
                found_all.extend(_results(operation, match["shape"], devices, times))
            elif loop := _LOOP.search(line):
                add(loop["body"], times * _iterations(line, bodies[loop["condition"]]))
            elif branches := _BRANCHES.search(line):
                for branch in branches[1].split(","):
                    add(branch.strip().lstrip("%"), times)
            else:
                for called in _CALLED.findall(line):
                    add(called, times)

    add(entry, 1)
    return found_all


def totals(found: Iterable[Collective]) -> dict[str, dict[str, dict[str, int]]]:
    """Operation -> element type -> count, bytes (of results, on one device), largest_bytes."""
    total: dict[str, dict[str, dict[str, int]]] = {}
    for one in found:
        kinds = total.setdefault(one.operation, {})
        entry = kinds.setdefault(one.dtype, {"count": 0, "bytes": 0, "largest_bytes": 0})
        entry["count"] += one.times
        entry["bytes"] += one.times * one.bytes
        entry["largest_bytes"] = max(entry["largest_bytes"], one.bytes)
    return total


def received_bytes(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Operation -> element type -> bytes that a device receives, sorted by name."""
    total: dict[str, dict[str, float]] = {}
    for one in found:
        kinds = total.setdefault(one.operation, {})
        kinds[one.dtype] = kinds.get(one.dtype, 0) + one.times * one.received
    return {
        name: {kind: round(kinds[kind]) for kind in sorted(kinds)} for name, kinds in sorted(total.items())
    }


def _iterations(loop: str, condition: Sequence[str]) -> int:
    if known := _TRIPS.search(loop):
        return int(known[1])
    limits = {int(value) for line in condition for value in _LIMIT.findall(line)}
    if len(limits) != 1 or not any("direction=LT" in line for line in condition):
        raise ValueError(
            f"loop condition: got the limits {sorted(limits)}, expected a comparison with one constant"
        )
    return limits.pop()


def _results(operation: str, shape: str, devices: int, times: int) -> Iterable[Collective]:
    parts = {
        "all-reduce": 2 * (devices - 1) / devices,
        "reduce-scatter": devices - 1,
        "collective-permute": 1,
    }
    share = parts.get(operation, (devices - 1) / devices)
    name = "reduce-scatter" if operation == "all-reduce-scatter" else operation
    for kind, dims in _ARRAY.findall(shape):
        sizes = tuple(int(size) for size in dims.split(",") if size)
        size = _bits(kind) * math.prod(sizes) // 8
        yield Collective(name, kind, sizes, times, size, size * share)


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)  # none in pred
    return int(digits[0]) if digits else 8


def _devices(line: str, everyone: int) -> int:
    """Devices of a group."""
    if listed := _LISTED.search(line):
        return listed[1].count(",") + 1
    if counted := _COUNTED.search(line):
        return int(counted[1])
    if mesh := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh["sizes"])}
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh["axes"])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return everyone
