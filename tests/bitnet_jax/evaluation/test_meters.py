"""Energy meters on a fake /sys/class/powercap and a fake NVML; the real ones are queried wherever the tests run."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from bitnet_jax.evaluation.meters import Meter, measure, open_meters


def zone(root: Path, name: str, label: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("100000000\n")
    return folder


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_packages_are_metered_and_their_subzones_are_not(tmp_path: Path, no_nvml: None) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 99_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:1", "psys", 5)
    meters, absent = open_meters(tmp_path)
    assert [meter.name for meter in meters] == ["RAPL package-0"]
    assert list(absent) == ["NVML"]
    assert "pip install nvidia-ml-py" in absent["NVML"]

    def work() -> None:
        (package / "energy_uj").write_text("1500000\n")  # the counter wrapped at 100 J

    assert measure(work, meters).joules["RAPL package-0"] == pytest.approx(2.5)


def test_missing_counters_have_a_reason(tmp_path: Path, no_nvml: None) -> None:
    meters, absent = open_meters(tmp_path / "nothing")
    assert meters == []
    assert "there is no" in absent["RAPL"]
    zone(tmp_path, "intel-rapl:0", "psys", 5)
    assert "no processor package" in open_meters(tmp_path)[1]["RAPL"]


def test_an_unreadable_counter_has_a_reason(
    tmp_path: Path, no_nvml: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux kernels since 2020 restrict it for ordinary users."""
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    read_text = Path.read_text

    def refused(path: Path, *args: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError("denied")
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", refused)
    assert "run as root" in open_meters(tmp_path)[1]["RAPL"]


def test_gpus_are_metered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter([1000, 2000, 7000, 12_000, 17_500, 18_000])
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meters, absent = open_meters(tmp_path)
    assert [meter.name for meter in meters] == ["NVML GPU 0", "NVML GPU 1"]
    assert list(absent) == ["RAPL"]
    measured = measure(lambda: None, meters)
    assert measured.joules == {"NVML GPU 0": pytest.approx(10.5), "NVML GPU 1": pytest.approx(6.0)}
    assert measured.seconds >= 0


def test_differences() -> None:
    assert Meter("m", float, 10.0).between(9.0, 2.0) == 3.0
    assert Meter("m", float).between(2.0, 9.0) == 7.0
