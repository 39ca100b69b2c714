"""Training sentence vectors: distances by hand, a float student that starts exact, a run to the packed encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.inference.text_vectors import embed, encoder_ids
from bitnet_jax.model_folders import load_text_model, save_model
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.initial import initial_values, read_initial, with_shape
from bitnet_jax.training.loop import fit
from bitnet_jax.training.sentence_vectors import hidden_distance, sentence_task, similarity_distance
from tests.bitnet_jax.interop.sentence_folder import write

WORDS = ("a cat", "the dog", "a mat", "the cat", "a dog", "the mat")
SENTENCES = [f"{a} {verb} {b}" for a in WORDS for b in WORDS for verb in ("sat on", "barks", "on")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float encoder as a packed folder, beside its sentences."""
    folder = tmp_path_factory.mktemp("sentences")
    save_model(folder / "float", load_text_model(write(folder / "encoder")))
    (folder / "sentences.txt").write_text("\n".join(SENTENCES) + "\n\n")
    return folder


def settings(folder: Path, precision: str, **changes: Any) -> RunConfig:
    return RunConfig.from_dict(
        {
            "task": "sentence_vectors",
            "init": str(folder / "float"),
            "model": {"precision": precision},
            "data": {
                "source": str(folder / "sentences.txt"),
                "length": 10,
                "batch_size": 8,
                "valid_fraction": 0.2,
            },
            "optimizer": {"learning_rate": 2e-3},
            "training": {"steps": 40, "eval_every": 20, "checkpoint_every": 20},
            "evaluation": {"batches": None, "batch_size": 8},
        }
        | changes
    )


def test_distances_by_hand() -> None:
    student = jnp.array(
        [[[[1.0, 2.0], [9.0, 9.0]]], [[[0.0, 0.0], [5.0, 5.0]]]]
    )  # 2 layers, 1 text, 2 tokens, D = 2
    teacher = jnp.array([[[[1.0, 1.0], [0.0, 0.0]]], [[[3.0, 4.0], [0.0, 0.0]]]])
    mask = jnp.array([[True, False]])
    assert float(hidden_distance(student, teacher, mask)) == pytest.approx(1 / 2 + 25 / 25)
    own, wanted = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    assert float(similarity_distance(own, wanted)) == pytest.approx(0.36)
    assert float(similarity_distance(own[:1], wanted[:1])) == 0


def test_a_float_student_starts_as_its_teacher_and_a_ternary_one_does_not(folder: Path) -> None:
    initial = read_initial(str(folder / "float"))
    found = {}
    for precision in ("float32", "bitnet_b158_channel"):
        config = with_shape(settings(folder, precision), initial)
        assert (config.data.begin_tokens, config.data.end_tokens) == ([2], [3])
        task = sentence_task(config)
        variables = jax.jit(lambda key, task=task: initial_values(task.init, initial, key))(jax.random.key(0))
        found[precision] = task.evaluate(variables)
        assert task.train_batch(0)["inputs"].shape == (8, 10)
    assert found["float32"]["loss"] == pytest.approx(0, abs=1e-6)
    assert found["float32"]["rank_correlation"] == pytest.approx(1)
    assert found["bitnet_b158_channel"]["loss"] > 0.05
    assert found["bitnet_b158_channel"]["rank_correlation"] < 0.99


def test_a_run_learns_and_its_packed_encoder_gives_the_same_vectors(folder: Path) -> None:
    config = settings(folder, "bitnet_b158_channel")
    before = sentence_task(with_shape(config, read_initial(config.init or "")))
    shorter = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=20))
    fit(shorter, folder / "run", progress=False)
    result = fit(config, folder / "run", progress=False)
    started = before.evaluate(before.init(jax.random.key(0)))  # random weights
    assert result["valid"]["rank_correlation"] > started["rank_correlation"]
    assert result["valid"]["loss"] < 0.5 * started["loss"]

    latent = load_text_model(folder / "run")
    save_model(folder / "packed", latent)
    packed = load_text_model(folder / "packed")
    assert (packed.conversation.begin, packed.conversation.end) == ((2,), (3,))
    assert packed.tokenizer is not None
    ids, _ = encoder_ids(packed.tokenizer, packed.conversation, SENTENCES[:5], packed.config.known_length)
    vectors = [embed(model.config, model.variables, ids) for model in (latent, packed)]
    np.testing.assert_allclose(*vectors, atol=1e-6)
    # A run can start from the packed encoder, whose latents quantize to the same codes.
    teacher = {"teacher": str(folder / "float")}
    again = settings(folder, "bitnet_b158_channel", init=str(folder / "packed"), distillation=teacher)
    task = sentence_task(with_shape(again, read_initial(str(folder / "packed"))))
    continued = initial_values(task.init, read_initial(str(folder / "packed")), jax.random.key(1))
    assert task.evaluate(continued)["loss"] == pytest.approx(result["valid"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {}, "init": None}, "init: got None for task 'sentence_vectors', expected the folder"),
        ({"init": "/nowhere"}, "init: got /nowhere, expected the folder of a run or of a packed model"),
        ({"model": {"precision": "int8", "num_layers": 1}}, "teacher: got num_layers=2, expected the run's 1"),
        ({"model": {"precision": "int8", "pooling": "none"}}, "model.pooling: got 'none' for task 'sentence_vectors'"),
        ({"model": {"precision": "int8", "vocab_size": 40}}, r"init: got embed/embedding \[30, 32\], expected"),
        ({"task": "language", "distillation": {}}, "model.pooling: got 'mean' for task 'language', expected 'none'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(settings(folder, "int8", **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer_is_refused(folder: Path) -> None:
    config = with_shape(settings(folder, "int8"), read_initial(str(folder / "float")))
    with pytest.raises(ValueError, match="expected an encoder with the tokenizer of the run"):
        sentence_task(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="byte"),
                                          model={**config.model, "vocab_size": 256}))  # fmt: skip
