"""Starting from a model: its shape, tokenizer and weights; what it lacks begins as in a new run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.initial import initial_values, read_initial, with_shape
from bitnet_jax.training.load import load_run
from bitnet_jax.training.loop import fit
from bitnet_jax.training.metrics import read_metrics
from bitnet_jax.training.task import initial_variables

TEXT = "the quick brown fox jumps over the lazy dog\n" * 40
FLOAT = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 24, "precision": "float32",
         "norm_placement": "pre"}  # fmt: skip


def settings(folder: Path, model: dict[str, Any], **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "model": model,
        "data": {"source": str(folder / "text.txt"), "split": "tail", "valid_fraction": 0.2, "length": 8,
                 "batch_size": 4, "tokenizer": "char"},
        "training": {"steps": 3, "eval_every": 3, "checkpoint_every": 3},
    }  # fmt: skip
    return RunConfig.from_dict(fields | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initial")
    (folder / "text.txt").write_text(TEXT)
    fit(settings(folder, FLOAT), folder / "run", progress=False)
    return folder / "run"


def from_run(run: Path, model: dict[str, Any], **changes: Any) -> RunConfig:
    unset = {"data": settings(run.parent, FLOAT).to_dict()["data"] | {"tokenizer": "byte"}}
    return settings(run.parent, model, init=str(run), **unset | changes)


def test_weights_tokenizer_and_shape_are_those_of_the_run_and_new_parameters_fresh(run: Path) -> None:
    config = from_run(run, {"precision": "bitnet_b158", "norm_placement": "sub"})
    initial = read_initial(str(run))
    whole = with_shape(config, initial)
    _, _, params, tokenizer = load_run(run)
    assert (whole.model["hidden_size"], whole.model["precision"]) == (16, "bitnet_b158")
    assert whole.data.tokenizer == str(run / "tokenizer.json")
    model = whole.model_config(tokenizer.vocab_size)
    fresh = initial_variables(whole, model, jax.random.key(5))["params"]
    values = initial_values(lambda key: initial_variables(whole, model, key), initial, jax.random.key(5))[
        "params"
    ]
    block, trained = values["layers_1"], params["layers_1"]
    np.testing.assert_array_equal(block["mlp"]["up_proj"]["weight"], trained["mlp"]["up_proj"]["weight"])
    assert "sub_norm" not in trained["mlp"]
    np.testing.assert_array_equal(
        block["mlp"]["sub_norm"]["scale"], fresh["layers_1"]["mlp"]["sub_norm"]["scale"]
    )


def test_a_run_begins_where_the_other_ended_and_resumes(run: Path, tmp_path: Path) -> None:
    still = {"optimizer": {"learning_rate": 1e-9, "warmup_steps": 0}}
    config = from_run(run, {"precision": "float32"}, **still, training={"steps": 2, "eval_every": 1})
    first = fit(config, tmp_path / "run", progress=False)
    ended = fit(settings(run.parent, FLOAT), run, progress=False)  # complete: its result
    assert first["valid"]["loss"] == pytest.approx(ended["valid"]["loss"], rel=1e-5)
    assert fit(config, tmp_path / "run", progress=False) == first
    assert load_run(tmp_path / "run")[0].init == str(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"precision": "int8", "num_layers": 1}}, "init: the run's model differs: .* missing"),
        ({"model": {"precision": "int8", "ffn_size": 32}}, r"weight \[16, 24\], expected the run's \[16, 32\]"),
        ({"training": {"scan_layers": True}}, "expected a text model without scan_layers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    run: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fields = {"model": {"precision": "int8"}} | changes
    with pytest.raises(ValueError, match=message):
        fit(from_run(run, **fields), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(run: Path) -> None:
    config = settings(run.parent, {"precision": "int8"}, init=str(run))
    with pytest.raises(ValueError, match="data.tokenizer: got 'char' beside init, expected it to be unset"):
        with_shape(config, read_initial(str(run)))


def test_frozen_parameters_of_the_model_stay_and_a_wrong_pattern_leaves_no_folder(
    run: Path, tmp_path: Path
) -> None:
    model = {"precision": "bitnet_b158"}
    frozen = from_run(run, model, optimizer={"rates": {"embed*": 0, "layers_0/*": 0.5}})
    fit(frozen, tmp_path / "run", progress=False)
    before, after = (load_run(folder)[2] for folder in (run, tmp_path / "run"))
    np.testing.assert_array_equal(after["embed"]["embedding"], before["embed"]["embedding"])
    moved = [np.abs(after[f"layers_{i}"]["mlp"]["up_proj"]["weight"]
                    - before[f"layers_{i}"]["mlp"]["up_proj"]["weight"]).mean() for i in range(2)]  # fmt: skip
    assert 0.3 < moved[0] / moved[1] < 0.7
    wrong = from_run(run, model, optimizer={"rates": {"embedd/*": 0}})
    with pytest.raises(ValueError, match="optimizer.rates: got 'embedd/\\*', which matches no parameter"):
        fit(wrong, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.optimized
def test_a_warm_up_begins_with_the_loss_of_the_float_model_and_measures_the_quantized_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(precision: str, **model: Any) -> tuple[float, float, dict[str, float]]:
        """Losses of the first and second update, and the last evaluation."""
        config = from_run(
            run,
            {"precision": precision, **model},
            optimizer={"learning_rate": 0.0},
            training={"steps": 2, "log_every": 1},
        )
        folder = tmp_path / "-".join(map(str, (precision, *model.values())))
        result = fit(config, folder, progress=False)
        losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
        return losses[0], losses[1], result["valid"]

    warm, floats, plain = (trained(name) for name in ("bitnet_b158(warmup=0.5)", "float32", "bitnet_b158"))
    assert warm[0] == floats[0] != plain[0]
    assert warm[1:] == plain[1:]
    sub = {"norm_placement": "sub"}
    with_norms = trained("bitnet_b158(warmup=0.5)", **sub, sub_norm_warmup=0.5)
    assert with_norms[0] == floats[0], "an inserted sub norm leaves the function unchanged"
    assert with_norms[1:] == trained("bitnet_b158", **sub)[1:]
    assert (
        "warm-up: updates before 1 train a blend with the float model; evaluations" in capsys.readouterr().err
    )
