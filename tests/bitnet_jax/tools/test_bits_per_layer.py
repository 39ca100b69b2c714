"""Bits chosen for each layer: what fits, what is predicted and measured, resumed and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.conversion import sensitivity
from bitnet_jax.model_folders import load_text_model
from bitnet_jax.packed.packing import sizes
from bitnet_jax.packed.proof import logits
from bitnet_jax.tools import bits_per_layer as tool
from bitnet_jax.tools import few_bits, layer_harms
from bitnet_jax.tools.bits_per_layer import KL_WINDOWS, Chosen, bits_per_layer
from tests.bitnet_jax.tools.float_models import TEXT, saved

BUDGET = 42_000  # of 38,656 bytes with one bit in all layers to 54,784 with eight
WINDOWS = 16  # that layers are fitted on


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are compared, no tokens generated: the tests of pack_model do that."""
    monkeypatch.setattr(few_bits, "PROOF_TOKENS", 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text(TEXT)
    saved(folder / "float")
    return folder


@pytest.fixture(scope="module")
def measured(source: Path) -> Path:
    """The harms of all layers, which no test has to measure again."""
    bits_per_layer(
        source / "float",
        source / "any",
        calibration=str(source / "text.txt"),
        count=WINDOWS,
        budget=BUDGET,
        parts=source / "parts",
        progress=False,
    )
    return source / "parts"


def choose(source: Path, target: Path, **options: Any) -> Chosen:
    options = {"calibration": str(source / "text.txt"), "count": WINDOWS} | options
    return bits_per_layer(source / "float", target, progress=False, **options)


def kl(source: Path, target: Path) -> float:
    """Of the windows where harms are measured."""
    models = [load_text_model(folder) for folder in (source / "float", target)]
    read = few_bits.calibration_windows(models[0], str(source / "text.txt"), 32, WINDOWS + KL_WINDOWS)
    both = [logits(m.config.module(), m.variables, jnp.asarray(read[WINDOWS:])) for m in models]
    return float(np.mean([sensitivity.divergence(p, q) for p, q in zip(*both, strict=True)]))


def test_what_is_written_fits_and_is_what_was_predicted(source: Path, tmp_path: Path, measured: Path) -> None:
    done = choose(source, tmp_path / "new", budget=BUDGET, parts=measured)
    model = load_text_model(tmp_path / "new")
    (attempt,) = done.attempts
    assert attempt.bytes == done.converted.sizes.total == sizes(model.variables).total <= BUDGET
    formats = {"binary": "binary", "ternary": "ternary2", "4": "int4", "8": "int8"}
    assert model.config.packed_formats() == {path: formats[grid] for path, grid in done.choice.items()}
    assert len(set(done.choice.values())) > 1
    harms = done.harms
    predicted = harms.other_kl + sum(harms.harms[path][grid].kl for path, grid in done.choice.items())
    assert attempt.predicted_kl == pytest.approx(predicted)
    assert attempt.measured_kl == pytest.approx(kl(source, tmp_path / "new"), rel=1e-3)
    # Harms are small here, so they nearly add.
    assert attempt.measured_kl == pytest.approx(attempt.predicted_kl, rel=0.33)
    assert measured.exists()
    assert not list(measured.glob("choice_*"))


@pytest.mark.extended
def test_chosen_bits_are_better_than_equal_ones(source: Path, tmp_path: Path, measured: Path) -> None:
    """In the bytes of a ternary model, and of one of four bits."""
    for grid, budget in (("ternary", 40_960), ("4", 45_568)):
        done = choose(source, tmp_path / grid, budget=budget, parts=measured)
        equal = dict.fromkeys(done.choice, grid)
        assert done.attempts[0].bytes <= budget == done.harms.bytes.total(equal)
        text = {"calibration": str(source / "text.txt"), "count": WINDOWS}
        few_bits.few_bits(source / "float", tmp_path / "equal", grid, overwrite=True, progress=False, **text)
        assert done.attempts[0].measured_kl < kl(source, tmp_path / "equal")


@pytest.mark.extended
def test_the_smallest_within_a_divergence(source: Path, tmp_path: Path, measured: Path) -> None:
    done = choose(source, tmp_path / "new", max_kl=0.002, parts=measured)
    assert done.attempts[-1].measured_kl <= 0.002
    frontier = done.harms.frontier()
    index = int(np.searchsorted(frontier.bytes, done.attempts[0].bytes - done.harms.bytes.others))
    assert done.attempts[0].predicted_kl <= 0.002 < done.harms.other_kl + frontier.harm[index - 1]


@pytest.mark.extended
def test_a_model_above_the_limit_is_not_written_but_another_one(
    source: Path, tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if harms added to three times their sum."""

    def understated(*arguments: Any) -> layer_harms.LayerHarms:
        found = layer_harms.layer_harms(*arguments)
        harms = {
            path: {grid: harm._replace(kl=harm.kl / 3) for grid, harm in its.items()}
            for path, its in found.harms.items()
        }
        return found._replace(harms=harms)

    monkeypatch.setattr(tool, "layer_harms", understated)
    done = choose(source, tmp_path / "new", max_kl=0.002, parts=measured)
    first, *_, last = done.attempts
    assert first.predicted_kl <= 0.002 < first.measured_kl
    assert last.measured_kl <= 0.002
    assert first.bytes < last.bytes == sizes(load_text_model(tmp_path / "new").variables).total
    with pytest.raises(ValueError, match=r"limit of 1e-09 .* at least .*; raise it \(what is measured"):
        choose(source, tmp_path / "other", max_kl=1e-9, parts=measured)
    assert not (tmp_path / "other").exists()


def test_an_interrupted_choice_continues_to_the_same_bytes(
    source: Path, tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(source, tmp_path / "whole", budget=BUDGET, parts=measured)
    calls: list[int] = []

    def stopping(probe: Any, *rest: Any) -> Any:
        calls.append(probe.layer)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return sensitivity.block_harms(probe, *rest)

    monkeypatch.setattr(layer_harms, "block_harms", stopping)
    with pytest.raises(KeyboardInterrupt):
        choose(source, tmp_path / "new", budget=BUDGET)
    parts = tmp_path / "new.parts"
    assert {path.name for path in parts.rglob("*")} == {"conversion.json", "harms", "layers_0.json"}
    with pytest.raises(ValueError, match=r"new.parts: got blocks of an interrupted conversion with settings"):
        few_bits.few_bits(source / "float", tmp_path / "new", progress=False)
    with pytest.raises(ValueError, match="interrupted conversion with settings"):
        choose(source, tmp_path / "new", budget=BUDGET, rotate=True)
    with monkeypatch.context() as patched:
        patched.setattr(tool, "prove_and_save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            choose(source, tmp_path / "new", budget=BUDGET)
    assert calls == [0, 1, 1]  # the second block was not finished
    assert not (tmp_path / "new").exists()
    done = choose(source, tmp_path / "new", budget=BUDGET)
    assert calls == [0, 1, 1]
    assert done.converted.resumed == 2
    assert not parts.exists()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.extended
def test_a_damaged_measurement_is_made_again(
    source: Path, tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = measured / "harms" / "layers_1.json"
    kept = file.read_text()
    file.write_text(kept[:100])
    choose(source, tmp_path / "new", budget=BUDGET, parts=measured)
    again = json.loads(file.read_text())
    expected = json.loads(kept)
    assert {path: {g: pytest.approx(v) for g, v in its.items()} for path, its in expected.items()} == again


def test_what_cannot_be_met_is_refused_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "layer_harms", lambda *_: pytest.fail("measured"))

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            choose(source, tmp_path / "new", **options)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("new*"))

    refused("got a budget of 9 bytes, expected 38,656 .* to 107,776 .*the float model", budget=9)
    refused("got a budget of 107,777 bytes", budget=107_777)
    refused("got budget=None, max_kl=None, expected one of the two")
    refused("got budget=9, max_kl=0.1", budget=9, max_kl=0.1)
    refused("max_kl=nan, expected .* above 0", max_kl=float("nan"))
    (tmp_path / "short.txt").write_text(TEXT[: 4 * 32 + 5])
    refused(
        "calibration text of 4 windows of 32 tokens, expected more than the 4",
        budget=BUDGET,
        calibration=str(tmp_path / "short.txt"),
    )


@pytest.mark.extended
@pytest.mark.parametrize("options", [{"rotate": True}, {"embedding": "int8", "activation": "int8"}])
def test_rotated_and_with_rounded_tables(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    done = choose(source, tmp_path / "new", budget=BUDGET, **options)
    (attempt,) = done.attempts
    assert attempt.bytes == done.converted.sizes.total
    assert attempt.measured_kl == pytest.approx(attempt.predicted_kl, rel=0.25)
    assert (done.harms.other_kl > 1e-6) == ("embedding" in options)


@pytest.mark.extended
def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, report = tmp_path / "new", tmp_path / "figures.json"
    calibration = ["--calibration", str(source / "text.txt")]
    arguments = ["convert", str(source / "float"), str(target), "--budget", str(BUDGET), *calibration]
    assert cli.main([*arguments, "--json", str(report)]) == 0
    figures, out = json.loads(report.read_text()), capsys.readouterr().out
    assert figures["attempts"][-1]["bytes"] == figures["bytes"]["total"] <= figures["budget"] == BUDGET
    assert sum(row["layers"] for row in figures["by_bits"].values()) == len(figures["choice"]) == 14
    assert sum(row["bytes"] for row in figures["by_bits"].values()) == figures["bytes"]["packed"]
    assert {path: set(its) for path, its in figures["harms"].items()} == dict.fromkeys(
        figures["choice"], {"binary", "ternary", "4", "8"}
    )
    lines = [line.split() for line in out.splitlines()]
    for row in figures["by_bits"].values():
        assert [f"{row['bits']:.3g}", str(row["layers"]), f"{row['bytes']:,d}"] in lines
    assert "nats a token predicted" in out
    new = ["convert", str(source / "float"), str(tmp_path / "b")]
    for wrong in (["--max-kl", "0.1"], ["--budget", "9", "--to", "gguf"], ["--budget", "9", *calibration]):
        assert cli.main([*new, *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: got ")
