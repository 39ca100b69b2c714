"""What the devices of a run could compute at most, and the memory it has taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bitnet_kernels.machine import float_peak_gflops, peak_rss

# Start of jax.Device.device_kind -> dense bfloat16 operations per second of a chip. Sources: NVIDIA's data sheets of
# A100, H100 and H200, without sparsity; TPU v4i: Jouppi et al., ISCA 2021; Cloud TPU's pages on v4, v5e, v5p and v6e.
# The first match counts, so longer names come first.
BFLOAT16_PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100": 312e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


class Peak(NamedTuple):
    """Operations per second of all devices together; None where unknown. `source` says of what, or why not."""

    flops: float | None
    source: str


def peak_flops(devices: Sequence[Any]) -> Peak:
    """The peak to relate training to. On a CPU it is measured, in about 20 ms; virtual devices share it."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        if len({device.process_index for device in devices}) > 1:
            return Peak(None, "not measured for several processes, which may share a machine")
        gflops = float_peak_gflops()
        if gflops is None:
            return Peak(None, "the C++ library, which measures the peak of a CPU, is missing")
        return Peak(1e9 * gflops, "float32 products on registers, measured when the run started")
    known = next((peak for name, peak in BFLOAT16_PEAKS.items() if kind.startswith(name)), None)
    if known is None:
        return Peak(None, f"no published peak of {kind} in training/hardware.py")
    return Peak(len(devices) * known, f"bfloat16, data sheet of {kind}")


def peak_memory(devices: Sequence[Any]) -> dict[str, int]:
    """Bytes: `resident` of this process, and `device` of its fullest device, if devices have separate memory."""
    statistics = [device.memory_stats() or {} for device in devices]
    used = [values["peak_bytes_in_use"] for values in statistics if "peak_bytes_in_use" in values]
    return {"resident": peak_rss()} | ({"device": max(used)} if used else {})
