"""Measurements record their code version: the commit, and whether the code differs from it."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
