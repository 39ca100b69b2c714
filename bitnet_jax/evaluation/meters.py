"""Hardware energy counters: RAPL of processor packages, NVML of NVIDIA GPUs.

They count everything the machine does, so measure on an otherwise idle machine, as the difference of two readings,
and measure the idle power too.
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
    """A counter of joules that wraps to 0 at `wraps_at` (None: never)."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None

    def between(self, before: float, after: float) -> float:
        """Joules between two readings; more than one wrap cannot be detected."""
        if after < before and self.wraps_at is not None:
            return after - before + self.wraps_at
        return after - before


@dataclasses.dataclass(frozen=True)
class Measured:
    seconds: float
    joules: dict[str, float]  # by meter name


def open_meters(powercap: Path = POWERCAP) -> tuple[list[Meter], dict[str, str]]:
    """The meters of this machine, and the reason for each kind that is unavailable."""
    meters: list[Meter] = []
    absent: dict[str, str] = {}
    for kind, found in (("RAPL", lambda: _rapl(powercap)), ("NVML", _nvml)):
        try:
            meters += found()
        except Exception as error:  # drivers and libraries raise all kinds of exceptions
            absent[kind] = " ".join(str(error).split()) or type(error).__name__
    return meters, absent


def measure(work: Callable[[], object], meters: list[Meter]) -> Measured:
    """Seconds and joules while `work()` runs; it must block until all its work is done."""
    before, began = [meter.read() for meter in meters], time.perf_counter()
    work()
    after, ended = [meter.read() for meter in meters], time.perf_counter()
    joules = {m.name: m.between(b, a) for m, b, a in zip(meters, before, after, strict=True)}
    return Measured(ended - began, joules)


def _rapl(powercap: Path) -> list[Meter]:
    """One meter per processor package, which includes its subzones (cores, memory)."""
    if not powercap.is_dir():
        raise OSError(f"there is no {powercap}; the kernel of this machine exposes no RAPL counters")
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
                    f"{file} cannot be read; run as root, or make it readable with chmod a+r"
                ) from error

        read()
        meters.append(Meter(f"RAPL {name.read_text().strip()}", read, 1e-6 * limit))
    if not meters:
        raise OSError(f"{powercap} has no processor package; virtual machines rarely expose one")
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
            # millijoules since the driver was loaded
            return 1e-3 * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)

        read()
        meters.append(Meter(f"NVML GPU {i}", read))
    if not meters:
        raise OSError("NVML found no GPU")
    return meters
