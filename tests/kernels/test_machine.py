"""Measurements record their code version, the commit and whether the code differs from it; the peak of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_kernels import machine


def test_the_commit_is_dirty_for_changed_code_and_not_for_changed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "kernels" / "bitnet_kernels"
    package.mkdir(parents=True)
    code, results = package / "machine.py", tmp_path / "results.jsonl"
    code.write_text("1\n")
    results.write_text("{}\n")
    monkeypatch.setattr(machine, "__file__", str(code))
    assert machine.commit() == "unknown"  # not a checkout
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    name = machine.commit()
    assert name != "unknown"
    assert not name.endswith("-dirty")
    results.write_text("{}\n{}\n")
    assert machine.commit() == name
    code.write_text("2\n")
    assert machine.commit() == f"{name}-dirty"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    code = "from bitnet_kernels.machine import peak_rss; print(peak_rss())"
    large = np.ones(1 << 29, np.uint8)  # more than the child needs
    peak = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )
    assert peak < large.nbytes
