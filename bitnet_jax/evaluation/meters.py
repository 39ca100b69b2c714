"""Energy counters of the machine itself: RAPL of the processor packages, NVML of NVIDIA GPUs.

They count everything that the machine does. So what a piece of work took is a difference of two readings on a quiet
machine, and its idle power is measured beside it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitnet_jax.optional_packages import missing_package

POWERCAP = Path("/sys/class/powercap")


@dataclasses.dataclass(frozen=True)
class Meter:
    """A counter of joules that begins again at 0 behind `wraps_at` (None: never)."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None

    def between(self, before: float, after: float) -> float:
        """Joules from one reading to the next; more than one wrap cannot be seen."""
        if after < before and self.wraps_at is not None:
            return after - before + self.wraps_at
        return after - before


@dataclasses.dataclass(frozen=True)
class Measured:
    seconds: float
    joules: dict[str, float]  # by name of meter


def open_meters(powercap: Path = POWERCAP) -> tuple[list[Meter], dict[str, str]]:
    """The meters of this machine, and for each kind that it does not offer the reason."""
    meters: list[Meter] = []
    absent: dict[str, str] = {}
    for kind, found in (("RAPL", lambda: _rapl(powercap)), ("NVML", _nvml)):
        try:
            meters += found()
        except Exception as error:  # drivers and libraries fail in ways of their own; each is a reason
            absent[kind] = " ".join(str(error).split()) or type(error).__name__
    return meters, absent


def measure(work: Callable[[], object], meters: list[Meter]) -> Measured:
    """What the meters count while `work()` runs; it must not return before all of it is done."""
    before, began = [meter.read() for meter in meters], time.perf_counter()
    work()
    after, ended = [meter.read() for meter in meters], time.perf_counter()
    joules = {m.name: m.between(b, a) for m, b, a in zip(meters, before, after, strict=True)}
    return Measured(ended - began, joules)


def _rapl(powercap: Path) -> list[Meter]:
    """One meter per processor package. Their parts (cores, memory) are counted in them."""
    if not powercap.is_dir():
        raise OSError(f"there is no {powercap}; the kernel of this machine shows no RAPL counters")
    meters = []
    for zone in sorted(powercap.glob("intel-rapl:[0-9]*")):  # AMD processors have this name too
        name = zone / "name"
        if zone.name.count(":") != 1 or not name.read_text().startswith("package"):
            continue
        file, limit = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())

        def read(file: Path = file) -> float:
            try:
                return 1e-6 * int(file.read_text())
            except PermissionError as error:
                raise PermissionError(
                    f"{file} cannot be read; run as root, or allow it: chmod a+r"
                ) from error

        read()
        meters.append(Meter(f"RAPL {name.read_text().strip()}", read, 1e-6 * limit))
    if not meters:
        raise OSError(f"{powercap} has no processor package; virtual machines rarely show one")
    return meters


def _nvml() -> list[Meter]:
    try:
        import pynvml
    except ImportError as error:
        raise ImportError(missing_package("nvidia-ml-py")) from error
    pynvml.nvmlInit()
    meters = []
    for i in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(i)

        def read(handle: Any = handle) -> float:
            return 1e-3 * pynvml.nvmlDeviceGetTotalEnergyConsumption(
                handle
            )  # millijoules since the driver began

        read()
        meters.append(Meter(f"NVML GPU {i}", read))
    if not meters:
        raise OSError("NVML found no GPU")
    return meters
