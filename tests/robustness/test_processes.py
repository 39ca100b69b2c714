"""The probes of processes.py, interrupts.py and determinism.py, which take minutes."""

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


@pytest.mark.slow
def test_determinism(tmp_path: Path) -> None:
    isas = cpu.available_isas()
    if not isas:
        pytest.skip("the C++ library is not there")
    assert determinism.compare(determinism.compute(tmp_path, isas))["faults"] == []
