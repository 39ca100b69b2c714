"""Classification tasks with `fit`: training, bit-identical resuming, loading, rejected input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bitnet_jax.data import load_images, load_labelled_text, whole_batches
from bitnet_jax.evaluation.classifiers import score_classifier
from bitnet_jax.training import RunConfig, RunError, fit, load_image_run, load_run
from bitnet_jax.training.loop import train
from bitnet_jax.training.metrics import read_metrics
from bitnet_jax.training.run_folder import RunFolder
from bitnet_jax.training.tasks import TASKS, image_task

MODELS: dict[str, dict[str, Any]] = {
    "mlp": dict(hidden_size=16, num_layers=2, precision="binaryconnect_stochastic"),
    "vision_transformer": dict(
        patch_size=4, hidden_size=8, ffn_size=8, num_layers=1, num_heads=2, mlp="relu", attention="binary",
        precision="bit_relu",
    ),
}  # fmt: skip


def image_config(architecture: str = "mlp", **sections: Any) -> RunConfig:
    model = dict(architecture=architecture, image_size=8, num_classes=10, **MODELS[architecture])
    fields = {
        "model": model,
        "data": dict(source="drawn", image_size=8, limit=60, batch_size=8),
        "training": dict(steps=7, log_every=2, eval_every=4, checkpoint_every=3, statistics_every=2),
        "evaluation": dict(batches=2, batch_size=50),
    }
    merged = {name: fields.get(name, {}) | sections.get(name, {}) for name in fields | sections}
    return RunConfig.from_dict(merged | {"task": "images"})


def rows(path: Path) -> list[dict[str, Any]]:
    found = list(read_metrics(path / "metrics.jsonl"))
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in found]


@pytest.mark.extended
@pytest.mark.parametrize("architecture", ["mlp", pytest.param("vision_transformer", marks=pytest.mark.slow)])
def test_an_interrupted_image_run_resumes_bit_identically(tmp_path: Path, architecture: str) -> None:
    config = image_config(architecture)
    whole = fit(config, tmp_path / "whole", progress=False)
    assert (whole["status"], whole["tokens"]) == ("finished", 7 * 8)
    assert set(whole["valid"]) == {"loss", "accuracy", "error", "f1", "matthews"}

    task, folder = image_task(config), RunFolder(tmp_path / "cut")

    def cut(step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return task.train_batch(step)

    with pytest.raises(KeyboardInterrupt), folder.training(config):
        train(task._replace(train_batch=cut), config, folder, progress=False)
    assert fit(config, tmp_path / "cut", progress=False)["valid"] == whole["valid"]
    (_, model, theirs), (_, _, ours) = load_image_run(tmp_path / "whole"), load_image_run(tmp_path / "cut")
    assert ("batch_stats" in ours) == (architecture == "mlp")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")

    sets = load_images("drawn", size=8, limit=60)
    held_out = {"inputs": sets.valid.images[:100], "targets": sets.valid.labels[:100]}
    assert score_classifier(model, ours, whole_batches(held_out, 50)).summary() == whole["valid"]
    if architecture == "mlp":
        assert all(np.abs(mean).max() > 0 for mean in flatten_dict(ours["batch_stats"], sep="/").values())


def test_a_classifier_is_tested_on_data_that_is_not_its_validation_data(tmp_path: Path) -> None:
    config = image_config(data=dict(test=True, valid_fraction=0.1))
    result = fit(config, tmp_path, progress=False)
    assert {"test_loss", "test_accuracy", "test_error"} <= result.keys()
    _, model, variables = load_image_run(tmp_path)
    sets = load_images("drawn", size=8, limit=60, test_with_valid=0.1)
    parts = {"test": sets.test, "valid": sets.valid}
    for name, part in parts.items():
        assert part is not None
        first = {"inputs": part.images[:100], "targets": part.labels[:100]}
        parts[name] = score_classifier(model, variables, whole_batches(first, 50)).summary()
    assert parts["valid"] == result["valid"]
    assert parts["test"] == {k.removeprefix("test_"): v for k, v in result.items() if k.startswith("test_")}
    assert parts["test"] != parts["valid"]


def test_evaluation_uses_the_trained_batch_statistics(tmp_path: Path) -> None:
    """With the initial statistics, a trained network would give another result."""
    config = image_config()
    fit(config, tmp_path, progress=False)
    _, model, variables = load_image_run(tmp_path)
    evaluate = TASKS["images"](config).evaluate
    initial = jax.tree.map(lambda x: np.ones_like(x), variables["batch_stats"])
    assert evaluate(variables)["loss"] != evaluate(variables | {"batch_stats": initial})["loss"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"image_size": 16}}, r"got images of \(16, 16, 1\), expected the model's \(8, 8, 1\)"),
        ({"model": {"num_classes": 9}}, "model.num_classes: got 9, expected the 10 classes"),
        ({"model": {"architecture": "transformer"}}, "got transformer for task"),
    ],
)
def test_models_that_do_not_match_the_images_are_rejected(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(image_config(**sections), tmp_path, progress=False)


TEXT_MODEL = dict(
    vocab_size=256, num_classes=2, causal=False, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1,
    ffn_size=8, mlp="relu", precision="float32",
)  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> str:
    words = [("good", 1), ("bad", 0)]
    lines = [json.dumps({"text": f"{words[i % 2][0]} film {i}", "label": words[i % 2][1]}) for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "texts.jsonl")


def text_config(source: str, **sections: Any) -> RunConfig:
    fields = {
        "model": TEXT_MODEL,
        "data": dict(source=source, length=12, batch_size=8, valid_fraction=0.3),
        "optimizer": dict(learning_rate=1e-2),
        "training": dict(steps=4, eval_every=2, checkpoint_every=2),
    }
    merged = {name: fields.get(name, {}) | sections.get(name, {}) for name in fields | sections}
    return RunConfig.from_dict(merged | {"task": "text_classification"})


@pytest.mark.slow
def test_distillation_from_another_text_run(tmp_path: Path, texts: str) -> None:
    teacher = text_config(texts, training=dict(steps=60, eval_every=60, checkpoint_every=60))
    result = fit(teacher, tmp_path / "teacher", progress=False)
    assert result["valid"]["accuracy"] == 1.0  # the first letter determines the class
    _, model, params, tokenizer = load_run(tmp_path / "teacher")
    assert (model.num_classes, tokenizer.kind) == (2, "byte")
    held_out = load_labelled_text(texts, length=12, valid_fraction=0.3).valid
    again = score_classifier(model, {"params": params}, whole_batches(held_out, 16)).summary()
    assert again == result["valid"]

    distillation = dict(teacher=str(tmp_path / "teacher"), relations=0.1)
    taught = fit(text_config(texts, distillation=distillation), tmp_path / "student", progress=False)
    # cross entropy with a confident teacher, and distances of at most 2 for one layer's 3 relations
    assert 0.1 < taught["train"]["loss"] < 0.9 + 0.1 * 3 * 2

    wrong = text_config(texts, distillation=distillation, model={"num_heads": 1})
    with pytest.raises(ValueError, match="got model.num_heads=2 in .*, expected the student's 1"):
        fit(wrong, tmp_path / "wrong", progress=False)
    nobody = text_config(texts, distillation={"teacher": str(tmp_path / "nobody")})
    with pytest.raises(RunError, match="no config.json"):
        fit(nobody, tmp_path / "without", progress=False)


def test_runs_of_the_wrong_kind_are_rejected(tmp_path: Path, texts: str) -> None:
    (tmp_path / "config.json").write_text(text_config(texts).to_json())
    with pytest.raises(RunError, match="got a run of task 'text_classification', expected images"):
        load_image_run(tmp_path)
    (tmp_path / "config.json").write_text(image_config().to_json())
    with pytest.raises(RunError, match="got a run on images, expected one on text"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="model.num_classes: got 3, expected the 2 classes"):
        fit(text_config(texts, model={"num_classes": 3}), tmp_path / "three", progress=False)
