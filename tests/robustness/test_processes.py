"""The probes of processes.py, interrupts.py and determinism.py, the long ones marked slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_kernels import cpu
from tests.robustness import determinism, processes
from tests.robustness.interrupts import interrupt_all


@pytest.mark.slow
@pytest.mark.parametrize("name", list(processes.PROBES))
def test_processes(name: str, tmp_path: Path) -> None:
    assert processes.outcomes(tmp_path, [name])["faults"] == []


@pytest.mark.slow
def test_ctrl_c_at_many_moments(tmp_path: Path) -> None:
    assert interrupt_all(4, tmp_path)["faults"] == []


@pytest.mark.parametrize("isas", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_determinism(isas: int | None, tmp_path: Path) -> None:
    """Quick: the fastest instruction set, on one core and on all."""
    if not cpu.available_isas():
        pytest.skip("the C++ library is not there")
    names = cpu.available_isas()[-1:] if isas else cpu.available_isas()
    assert determinism.compare(determinism.compute(tmp_path, names))["faults"] == []
