"""`bitnet-jax energy`: presets, config files and folders, and its message where nothing can be measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.evaluation.meters import Meter
from bitnet_jax.models import PRESETS, Transformer
from bitnet_jax.packed import packing, storage
from bitnet_jax.tools import energy_report

CONFIG = """
from ml_collections import ConfigDict
def get_config():
    fields = dict(hidden_size=32, ffn_size=64, num_layers=1, num_heads=2, MORE)
    return ConfigDict(dict(model=ConfigDict(fields), data=ConfigDict(dict(tokenizer="char", length=16))))
"""
NO_METERS = ([], {"RAPL": "no counters", "NVML": "no GPU"})


def figures(tmp_path: Path, *arguments: str) -> dict:
    assert cli.main(["energy", *arguments, "--json", f"{tmp_path}/energy.json"]) == 0
    return json.loads((tmp_path / "energy.json").read_text())


def test_figures_of_2b4t(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(energy_report, "open_meters", lambda: NO_METERS)
    got = figures(tmp_path, "--preset", "2b4t")
    assert got["joules"]["7nm"]["total"] == pytest.approx(0.0278, abs=5e-5)  # published as 0.028
    assert got["joules"]["7nm"]["per_token"] == got["joules"]["7nm"]["total"] / 512
    assert got["joules"]["7nm"]["total_with_head"] > 3 * got["joules"]["7nm"]["total"]
    size = got["bytes"]
    assert size["weights_total"] == packing.sizes(packing.abstract(PRESETS["2b4t"])).total
    assert size["weights"]["linear ternary2"] == pytest.approx(size["linear_packed_as"]["I2_S"], rel=1e-4)
    assert size["weights"]["embedding bfloat16"] == 2 * 128_256 * 2560
    assert size["kv_cache"] == 2 * 30 * 512 * 5 * 128 * 4
    out = capsys.readouterr().out
    assert "measured, RAPL: not available here: no counters" in out
    assert "19.89 times less than in floats" in out


def test_options_change_the_figures_they_document(tmp_path: Path) -> None:
    base = figures(tmp_path, "--preset", "125m", "--length", "64")
    small = figures(
        tmp_path, "--preset", "125m", "--length", "64", "--kv-format", "int8", "--zeros", "*down_proj=0.5"
    )
    values, scales = 2 * 11 * 64 * 768, 2 * 11 * 64 * 12 * 4
    assert (base["bytes"]["kv_cache"], small["bytes"]["kv_cache"]) == (4 * values, values + scales)
    assert small["activated_parameters"] == base["linear_parameters"] - 11 * 768 * 3072 / 2
    floats = figures(
        tmp_path, "--preset", "125m", "--length", "64", "--recipe", "float32", "--floats", "float32"
    )
    assert floats["joules"]["45nm"]["floats_over_this"] == 1
    assert "linear float32" in floats["bytes"]["weights"]


@pytest.mark.slow
def test_a_config_file_and_a_packed_folder_agree(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(CONFIG.replace("MORE", "vocab_size=50, head='int8'"))
    by_file = figures(tmp_path, "--config", str(file), "--length", "8")
    config = energy_report.chosen_config(None, str(file), None, None, None)
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    storage.save_packed(tmp_path / "packed", packing.pack(params, config), config)
    by_folder = figures(tmp_path, f"{tmp_path}/packed", "--length", "8")
    assert by_file == by_folder
    assert (
        by_file["bytes"]["weights"]["head int8"]
        == packing.abstract(config)["packed"]["lm_head"]["weight"].nbytes
    )


def test_meters_are_read_during_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IDLE_SECONDS", "WORK_SECONDS"):
        monkeypatch.setattr(energy_report, name, 0.01)
    readings = iter([0.0, 1.0, 10.0, 74.0])  # idle from 0 to 1 J, busy from 10 to 74 J
    meter = Meter("RAPL package-0", lambda: next(readings))
    monkeypatch.setattr(energy_report, "open_meters", lambda: ([meter], {"NVML": "no GPU"}))
    monkeypatch.setitem(energy_report.measured_figures.__kwdefaults__, "new_tokens", 4)
    monkeypatch.setitem(energy_report.measured_figures.__kwdefaults__, "prompt", 4)
    assert "tiny" in PRESETS
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], num_layers=1))
    # The meters are opened twice: before and after the random weights are written.
    measured = figures(tmp_path, "--preset", "tiny", "--measure")["measured"]
    assert measured["joules_per_token"]["RAPL package-0"] == pytest.approx(64 / measured["tokens"])
    assert measured["idle_watts"]["RAPL package-0"] <= 1 / 0.01
    assert measured["absent"] == {"NVML": "no GPU"}
    assert measured["tokens"] % 4 == 0


def test_nothing_is_generated_without_a_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_report, "open_meters", lambda: NO_METERS)
    monkeypatch.setattr(energy_report, "generate", None)
    assert figures(tmp_path, "--preset", "100b", "--measure")["measured"] == {"absent": NO_METERS[1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of FOLDER, --preset NAME and --config NAME or FILE.py"),
        (["--preset", "2b4t", "--config", "x.py"], "expected one of FOLDER"),
        (["--preset", "9b"], "--preset: got '9b', expected one of"),
        (["--preset", "tiny", "--zeros", "*=much"], "expected PATTERN=SHARE"),
        (["--preset", "tiny", "--zeros", "*wo=0.5"], "expected one that matches"),
        (["{}", "--preset", "tiny"], "got MODEL with --preset"),
        (["--config", "{}/config.py"], "set model.vocab_size"),
        (["--config", "{}/config.py", "--head", "int8"], "set them in the config file"),
    ],
)
def test_invalid_arguments_are_rejected(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.py").write_text(CONFIG.replace("MORE", ""))
    assert cli.main(["energy", *(word.format(tmp_path) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
