"""Continuing training from other weights, and evaluating weights under another recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitnet_experiments.origin import origin
from bitnet_experiments.runs import measure, model_of, sizes, train, train_from
from bitnet_experiments.study import Study, overridden
from bitnet_jax.models import ModelConfig
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.load import load_run
from bitnet_jax.training.run_folder import RunFolder


def changed(config: RunConfig, **overrides: object) -> RunConfig:
    return RunConfig.from_dict(
        overridden(config.to_dict(), {n.replace("__", "."): v for n, v in overrides.items()})
    )


@pytest.mark.slow
def test_training_continues_from_given_weights(study: Study, tmp_path: Path) -> None:
    config = study.settings("float32", 0)
    first = train(config, tmp_path / "float")
    _, _, params, _ = load_run(tmp_path / "float")
    assert measure(config, params)["valid_loss"] == pytest.approx(first["valid_loss"], rel=1e-6)

    # With a learning rate of 0 the result is the start: the given weights, and learned scales measured on them.
    still = changed(config, model__precision="paretoq_2", optimizer__learning_rate=0.0)
    row = train_from(params, still, tmp_path / "still")
    _, _, same, _ = load_run(tmp_path / "still")
    layer = same["layers_0"]["mlp"]["down_proj"]
    np.testing.assert_array_equal(layer["weight"], params["layers_0"]["mlp"]["down_proj"]["weight"])
    largest = np.abs(layer["weight"]).max(axis=1, keepdims=True)
    np.testing.assert_allclose(layer["weight_scale"], largest, rtol=1e-6)
    assert row["valid_loss"] == pytest.approx(measure(still, same)["valid_loss"], rel=1e-6)
    assert row["parameters"] > first["parameters"]


def test_a_finished_training_is_reused(study: Study, tmp_path: Path) -> None:
    config = study.settings("ternary", 0)
    row = train(config, tmp_path / "run")
    assert train(config, tmp_path / "run") == row
    assert row["config_hash"] == config.hash()
    assert row["training_flops"] > 6 * row["tokens"] * 16 * 16  # of one matrix alone
    assert 0 <= row["train_zero_fraction"] <= 1


@pytest.mark.slow
def test_a_training_never_continues_under_other_settings(study: Study, tmp_path: Path) -> None:
    """Not even for more steps: a row describes a training with its settings from the start."""
    config = study.settings("ternary", 0)
    longer = changed(config, training__steps=6)
    whole = train(longer, tmp_path / "whole")
    train(config, tmp_path / "run")
    row = train(longer, tmp_path / "run")
    measured = ("training_seconds", "mfu")
    assert {n: v for n, v in row.items() if n not in measured} == {
        n: v for n, v in whole.items() if n not in measured
    }
    assert RunFolder(tmp_path / "run.stale").read_config() == config


def test_a_training_is_not_reused_by_other_code(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study.settings("float32", 7, small=True)
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    there = origin() | {"code": "0" * 12}
    monkeypatch.setattr("bitnet_experiments.runs.origin", lambda: there)
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns != before
    assert (tmp_path / "run.stale" / "result.json").stat().st_mtime_ns == before


def test_a_model_of_another_study_is_trained_once(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet_experiments.study.STUDIES", study.folder.parent)
    row, config, params = model_of("toy", "float32", 7, tmp_path / "runs" / "asking", small=True)
    folder = tmp_path / "runs" / "toy-small" / "float32-seed7"
    before = (folder / "result.json").stat().st_mtime_ns
    assert config == study.settings("float32", 7, small=True)
    again, _, same = model_of("toy", "float32", 7, tmp_path / "runs" / "asking", small=True)
    assert again == row
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert measure(config, same)["valid_loss"] == pytest.approx(row["valid_loss"], rel=1e-6)
    other = measure(config, params, precision="bitnet", kv_bits=2)
    assert other["valid_loss"] != row["valid_loss"]
    assert other["config_hash"] != row["config_hash"]


def test_sizes_count_a_table_of_integers_by_its_bits() -> None:
    """One byte per number and a float16 scale per 32 of them, instead of four bytes."""
    shape = {
        "vocab_size": 7,
        "hidden_size": 64,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_size": 64,
        "max_length": 4,
    }
    plain, tables = (
        sizes(ModelConfig(precision="bitnet", embedding_dtype=dtype, tie_embeddings=False, **shape))
        for dtype in ("float32", "int8")
    )
    assert plain["model_bytes"] - tables["model_bytes"] == 2 * 7 * (4 * 64 - (64 + 2 * 2))
    assert plain["weight_bits"] == tables["weight_bits"] == 1


def test_sizes_count_bits_scales_and_the_rest() -> None:
    shape = {
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_size": 16,
        "max_length": 4,
        "mlp": "relu",
    }
    weights, others = (
        4 * 8 * 8 + 2 * 8 * 16,
        5 * 8 + (2 * 8 + 8 + 16 + 8),
    )  # embedding, two block and two sub norms, final
    scales = {"float32": 0, "bitnet": 6, "paretoq_2": 4 * 8 + 8 + 16}
    bits = {"float32": 32, "bitnet": 1, "paretoq_2": 2}
    for recipe, count in scales.items():
        found = sizes(ModelConfig(vocab_size=5, precision=recipe, **shape))
        assert found == {
            "weight_bits": bits[recipe],
            "model_bytes": weights * bits[recipe] / 8 + 4 * (others + count),
        }
