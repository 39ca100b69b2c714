"""How many processors this process may use: its affinity, and the quota of its control group (containers)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def threads() -> int:
    """Number of processors available to this process, at least 1."""
    limit = quota()
    return affinity() if limit is None else max(1, min(affinity(), math.ceil(limit)))


def affinity() -> int:
    """Number of processors that this process may be scheduled on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(groups: Path = GROUPS, mount: Path = MOUNT) -> float | None:
    """Processors' worth of time that the control group and those above it may use; None: as much as there is.

    Args:
      groups: the file that names the groups of the process; versions 1 and 2 of control groups.
      mount: the folder of their settings.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # another operating system
        return None
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            limits += _limits(mount, path, _version_2)
        elif "cpu" in controllers.split(","):
            limits += _limits(mount / controllers, path, _version_1) or _limits(
                mount / "cpu", path, _version_1
            )
    return min(limits, default=None)


def _limits(mount: Path, path: str, read: Callable[[Path], Iterator[float]]) -> list[float]:
    """The limits of a group and of all above it."""
    folder = Path(path.lstrip("/"))
    found = []
    for group in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such setting
            found += list(read(mount / group))
    return found


def _version_2(group: Path) -> Iterator[float]:
    limit, period = (group / "cpu.max").read_text().split()
    if limit != "max":
        yield int(limit) / int(period)


def _version_1(group: Path) -> Iterator[float]:
    limit = int((group / "cpu.cfs_quota_us").read_text())
    if limit > 0:
        yield limit / int((group / "cpu.cfs_period_us").read_text())
