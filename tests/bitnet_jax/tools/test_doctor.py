"""The doctor passes on a healthy machine and detects every kind of broken kernel."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.models import PRESETS, ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.tools import doctor, kernel_checks
from bitnet_jax.tools.kernel_checks import Check
from bitnet_kernels import IMPLEMENTATIONS, cpu, pallas_gpu

TINY = ModelConfig(vocab_size=16, hidden_size=32, ffn_size=32, num_layers=1, num_heads=2, max_length=16)


@pytest.mark.slow  # test_kernel_checks.py runs the same checks of kernels
def test_the_command_reports_every_implementation_and_exits_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TOKENS", 2)
    monkeypatch.setattr(kernel_checks, "SHAPES", ((2, 48, 256, 4),))
    assert cli.main(["doctor", "--json", f"{tmp_path}/doctor.json"]) == 0
    report = json.loads((tmp_path / "doctor.json").read_text())
    passed = {check["name"] for check in report["checks"] if check["passed"]}
    for isa in cpu.available_isas():
        kinds = ("products", "scaled products", "attention", "head", "tiny model")
        assert {f"{kind}, cpu ({isa})" for kind in kinds} <= passed
    assert {f"{kind}, reference" for kind in ("products", "scaled products", "attention", "head")} <= passed
    assert report["healthy"] is True
    assert report["choice"]["name"] in IMPLEMENTATIONS
    out = capsys.readouterr().out
    assert "healthy" in out
    assert f"packed_matmul runs on {report['choice']['name']}" in out


def test_a_wrong_kernel_is_reported_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Check("products, cpu (avx2)", False, "ternary2 m=1: 1 of 1 differ"),
        Check("head, reference", True, ""),
    ]
    monkeypatch.setattr(doctor, "check_kernels", lambda: found)
    monkeypatch.setattr(doctor, "_check_models", lambda: [])
    assert cli.main(["doctor"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1
    assert "products, cpu (avx2)" in wrong[0]
    assert "1 of 1 differ" in wrong[0]


@pytest.mark.extended
def test_a_packed_model_that_differs_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof names the differing code; every other instruction set detects it in its logits."""
    pack = packing.pack

    def spoiled(params: Any, config: Any) -> Any:
        variables = pack(params, config)
        layer = variables["packed"]["layers_0"]["mlp"]["up_proj"]
        layer["weight"] = dataclasses.replace(layer["weight"], codes=~layer["weight"].codes)
        return variables

    monkeypatch.setattr(packing, "pack", spoiled)
    monkeypatch.setattr(doctor, "PRESETS", PRESETS | {"tiny": TINY})
    checks = {check.name: check for check in doctor._check_models()}
    assert {check.passed for check in checks.values()} == {False}
    assert not doctor.healthy(list(checks.values()))
    proved = "tiny model, cpu (" + cpu.isa() + ")" if cpu.available_isas() else "tiny model, reference"
    assert "layers_0/mlp/up_proj: code [0, 0]" in checks.pop(proved).detail
    assert all("logits differ by" in check.detail for check in checks.values())


def test_a_missing_library_is_reported_with_its_reason_and_is_not_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "available_isas", lambda: ())
    monkeypatch.setattr(cpu, "unavailable", lambda: "_cpu.so was not built")
    absent = doctor._absent()
    assert [(check.name, check.passed) for check in absent] == [("cpu", None), ("gpu", None), ("tpu", None)]
    assert absent[0].detail == "_cpu.so was not built"
    assert doctor.healthy(absent)


def test_absent_instruction_sets_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_isas", lambda: ("scalar",))
    monkeypatch.setattr(cpu, "known_isas", lambda: ("scalar", "avx2", "amx"))
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    assert [check.name for check in doctor._absent()] == ["cpu (avx2)", "cpu (amx)", "gpu", "tpu"]


def test_accelerators_are_reported_with_the_choice_of_packed_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    details = {check.name: check.detail for check in doctor._absent()}
    assert details["tpu"].startswith("Pallas kernel for layout column, not checked: no tpu here")
    monkeypatch.setattr(pallas_gpu, "obstacle", lambda w: "the GPU kernel needs jax 99")
    assert doctor._accelerator("gpu") == "XLA unpacks and multiplies: the GPU kernel needs jax 99"
    monkeypatch.setattr(pallas_gpu, "obstacle", lambda w: None)
    assert doctor._accelerator("gpu").startswith("Pallas kernel for layout plane, not checked: no gpu here")


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu.known_isas())
def test_the_doctor_passes_under_each_forced_instruction_set(isa: str) -> None:
    if isa not in cpu.available_isas():
        pytest.skip(f"this processor has no {isa}")
    environment = os.environ | {cpu.ISA_VARIABLE: isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "bitnet_jax.cli", "doctor"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{isa} forced by {cpu.ISA_VARIABLE}" in done.stdout


def test_an_unknown_forced_instruction_set_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not cpu.available_isas():
        pytest.skip(f"no C++ kernels: {cpu.unavailable()}")
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse9")
    assert cli.main(["doctor"]) == 2
    assert "'sse9'" in capsys.readouterr().err
