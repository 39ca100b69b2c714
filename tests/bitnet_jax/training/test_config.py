"""Run configs: round trips, and errors that name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ml_collections import ConfigDict

from bitnet_jax.training.config import ADDED_LATER, CHANGEABLE_ON_RESUME, RunConfig, differing_fields

MODEL = dict(hidden_size=8, num_layers=1, num_heads=2, ffn_size=8)


def test_a_config_dict_with_all_sections() -> None:
    fields = ConfigDict(
        {
            "seed": 3,
            "model": MODEL | {"precision": (("*/mlp/*", "int8"), ("*", "bitnet"))},
            "data": {"source": "stdlib", "length": 16},
            "optimizer": {"schedule": "two_stage", "learning_rate": 1},
            "training": {"steps": 5, "max_loss": 9.0},
            "evaluation": {"batches": None},
        }
    )
    config = RunConfig.from_dict(fields)
    assert config.seed == 3
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.evaluation.batches is None
    model = config.model_config(vocab_size=256)
    assert (model.vocab_size, model.max_length) == (256, 16)
    assert model.precision == (("*/mlp/*", "int8"), ("*", "bitnet"))

    again = RunConfig.from_json(config.to_json())
    assert again.to_dict() == config.to_dict() == json.loads(config.to_json())
    assert again.model_config(256) == model
    assert again.hash() == config.hash()
    assert differing_fields(config, again) == []


def test_the_hash_is_stable_and_covers_every_section() -> None:
    base = {"model": MODEL}
    changed: list[dict[str, Any]] = [
        base,
        base | {"seed": 1},
        base | {"model": MODEL | {"num_layers": 2}},
        base | {"data": {"length": 64}},
        base | {"optimizer": {"beta2": 0.99}},
        base | {"training": {"steps": 7}},
        base | {"evaluation": {"batches": 3}},
    ]
    hashes = {RunConfig.from_dict(fields).hash() for fields in changed}
    assert len(hashes) == len(changed)
    spelled = base | {"seed": 0, "training": {"steps": 1000, "z_loss": 0}, "mesh": {"fsdp": 2}}
    assert RunConfig.from_dict(spelled).hash() == RunConfig.from_dict(base).hash()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modle": {}}, "section of config: got 'modle', .*did you mean 'model'"),
        ({}, "no section model"),
        ({"model": 3}, "config.model: got 3, expected a section"),
        (
            {"model": MODEL | {"hiden_size": 3}},
            "field of model: got 'hiden_size', .*did you mean 'hidden_size'",
        ),
        ({"model": MODEL | {"precision": "bitnet_b159"}}, "bitnet_b159.*did you mean 'bitnet_b158'"),
        ({"model": MODEL | {"num_heads": 3}}, "num_heads"),
        ({"model": MODEL | {"max_length": 8}, "data": {"length": 9}}, "max_length: got 8.*at least 9"),
        (
            {"model": MODEL | {"trained_length": 8}},
            "trained_length: got 8, expected it to be unset",
        ),
        ({"model": MODEL, "data": {"lenght": 3}}, "field of data: got 'lenght', .*did you mean 'length'"),
        ({"model": MODEL, "training": {"zzz": 3}}, "field of training: got 'zzz', expected one of steps"),
        ({"model": MODEL, "training": {"steps": "10"}}, "training.steps: got '10', expected int"),
        ({"model": MODEL, "training": {"steps": True}}, "training.steps: got True, expected int"),
        (
            {"model": MODEL, "training": {"steps": 0}},
            "training.steps: got 0, expected a number from 1 to 2147483647",
        ),
        (
            {"model": MODEL, "training": {"steps": 2**31}},
            "training.steps: got 2147483648, expected a number from",
        ),
        ({"model": MODEL, "training": {"statistics_every": 2**40}}, "training.statistics_every: got 10995"),
        (
            {"model": MODEL, "optimizer": {"learning_rate": float("inf")}},
            "learning_rate: got inf, expected float",
        ),
        (
            {"model": MODEL, "optimizer": {"epsilon": float("nan")}},
            "optimizer.epsilon: got nan, expected float",
        ),
        ({"model": MODEL, "optimizer": {"beta1": 10**400}}, "optimizer.beta1: got 1000"),
        ({"model": MODEL | {"num_layers": 2**31}}, "model.num_layers: got 2147483648, expected at most 4096"),
        ({"model": MODEL | {"hidden_size": 2**40}}, "model.hidden_size: got 1099511627776, expected at most"),
        (
            {"model": MODEL, "data": {"length": 2**40}},
            "model.max_length: got 1099511627776, expected at most",
        ),
        ({"model": MODEL, "training": {"keep_best": 1}}, "training.keep_best: got 1, expected bool"),
        (
            {"model": MODEL, "training": {"max_loss": "x"}},
            r"training.max_loss: got 'x', expected float \| None",
        ),
        ({"model": MODEL, "training": {"accumulate": 3}}, "batch_size=16 is not a multiple of.*accumulate=3"),
        ({"model": MODEL, "evaluation": {"batches": 0}}, "batches=0"),
        ({"model": MODEL, "data": {"limit": -5}}, "data.limit: got -5, expected at least 1"),
        ({"model": MODEL, "data": {"length": 0}}, "data.length: got 0, expected at least 1"),
        ({"model": MODEL, "data": {"batch_size": -1}}, "data.batch_size: got -1, expected at least 1"),
        ({"model": MODEL, "data": {"image_size": 0}}, "data.image_size: got 0, expected at least 1"),
        (
            {"model": MODEL, "data": {"valid_fraction": 1.0}},
            "data.valid_fraction: got 1.0, expected a number",
        ),
        ({"model": MODEL, "data": {"limit": 5}}, "data.limit: got 5 for task 'language', which has no such"),
        ({"model": MODEL, "data": {"image_size": 5}}, "data.image_size: got 5 for task 'language'"),
        (
            {"model": MODEL | {"num_classes": 2}, "task": "text_classification", "data": {"image_size": 5}},
            "data.image_size: got 5 for task 'text_classification'",
        ),
        (
            {"model": MODEL, "task": "images", "data": {"skip_bad_files": True}},
            "data.skip_bad_files: got True for task 'images'",
        ),
        ({"model": MODEL, "mesh": {"fsdp": 0}}, "mesh.fsdp: got 0, expected at least 1"),
        (
            {"model": MODEL, "data": {"length": 9}, "mesh": {"context": 2}},
            "mesh.context: got 2, expected a divisor of data.length=9; change one of them",
        ),
        (
            {"model": MODEL | {"attention": "linear"}, "mesh": {"context": 2}},
            "mesh.context: got 2 with causal model.attention 'linear'",
        ),
        (
            {"model": {"architecture": "mlp"}, "task": "images", "mesh": {"context": 2}},
            "mesh.context: got 2 for task 'images', whose inputs are not sequences",
        ),
        (
            {
                "model": MODEL | {"num_classes": 2},
                "task": "text_classification",
                "distillation": {"teacher": "x", "relations": 1.0},
                "mesh": {"context": 2},
            },
            "mesh.context: got 2 with distillation.relations",
        ),
        (
            {"model": MODEL, "optimizer": {"rates": {"embed*": "0"}}},
            "optimizer.rates: got {'embed\\*': '0'}, expected",
        ),
        (
            {"model": MODEL, "optimizer": {"rates": {"embed*": 0}}, "training": {"scan_layers": True}},
            "training.scan_layers: got True with optimizer.rates",
        ),
        ({"model": MODEL, "mesh": {"pipeline": 2}}, "field of mesh: got 'pipeline'"),
        (
            {"model": MODEL, "training": {"accumulate": 4}, "mesh": {"data": 4, "fsdp": 2}},
            "data=4 times fsdp=2, expected a divisor of the 4 sequences",
        ),
        ({"model": MODEL, "seed": -1}, "seed: got -1"),
        ({"model": MODEL, "task": "image"}, "config.task: got 'image', expected one of language, images"),
        ({"model": MODEL | {"num_classes": 2}}, "model.num_classes: got 2 for task 'language'"),
        ({"model": MODEL, "task": "text_classification"}, "model.num_classes: got 0 for task"),
        ({"model": MODEL, "task": "images"}, "got transformer for task 'images', expected mlp, cnn or"),
        ({"model": MODEL | {"architecture": "mlp"}}, "got 'mlp' for task 'language', expected transformer"),
        (
            {"model": MODEL, "distillation": {"teacher": "x"}},
            "distillation.teacher: got a teacher for task 'lang",
        ),
    ],
)
def test_errors_name_the_invalid_setting(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RunConfig.from_dict(fields)
    assert "\n" not in str(error.value)


def test_a_language_model_records_its_training_length() -> None:
    fields: dict[str, Any] = {"model": MODEL | {"max_length": 512}, "data": {"length": 64}}
    config = RunConfig.from_dict(fields)
    model = config.model_config(256)
    assert (model.trained_length, model.known_length, model.max_length) == (64, 64, 512)
    assert "trained_length" not in config.to_json()
    assert config.hash() == "3e26dfe3a475"  # as before this field existed: runs and results keep their names
    texts = fields | {"task": "text_classification", "model": MODEL | {"num_classes": 2}}
    assert RunConfig.from_dict(texts).model_config(256).trained_length is None


def test_skipping_bad_files_is_a_setting_and_older_runs_keep_their_hash() -> None:
    asked = RunConfig.from_dict({"model": MODEL, "data": {"skip_bad_files": True}})
    plain = RunConfig.from_dict({"model": MODEL, "data": {"skip_bad_files": False}})
    assert plain.hash() == RunConfig.from_dict({"model": MODEL}).hash() == "b90c6977cc6e" != asked.hash()
    assert differing_fields(asked, plain) == ["data.skip_bad_files: True, 'not set'"]


def test_a_field_added_later_leaves_the_hash_while_it_has_its_default() -> None:
    """Which fields were is listed; a new one that is not would change the pinned hash above."""
    plain = RunConfig.from_dict({"model": MODEL})
    for section, names in ADDED_LATER.items():
        explicit = {name: plain.to_dict()[section][name] for name in names}
        assert RunConfig.from_dict({"model": MODEL, section: explicit}).hash() == plain.hash()
    assert plain.hashes() == (plain.hash(), "2e47c4428c81")
    limited = RunConfig.from_dict(
        {"model": MODEL, "optimizer": {"weight_decay": 0.5}, "data": {"limit": None}}
    )
    assert len(limited.hashes()) == 2
    teacher = RunConfig.from_dict({"model": MODEL, "distillation": {"temperature": 2.0}})
    assert len(teacher.hashes()) == 1, "no result before there was distillation has this setting"
    tested = RunConfig.from_dict({"model": MODEL, "data": {"test": True}})
    assert tested.hash() != plain.hash()
    with pytest.raises(
        ValueError, match=r"data.valid_fraction: got 0.6, expected a number between 0 and 0.5"
    ):
        RunConfig.from_dict({"model": MODEL, "data": {"test": True, "valid_fraction": 0.6}})


def test_a_vocabulary_smaller_than_the_tokenizer_is_rejected() -> None:
    config = RunConfig.from_dict({"model": MODEL | {"vocab_size": 100}})
    with pytest.raises(ValueError, match="vocab_size: got 100, expected at least 256"):
        config.model_config(256)


def test_other_json_is_rejected() -> None:
    with pytest.raises(ValueError, match="list, expected an object"):
        RunConfig.from_json("[1]")
    with pytest.raises(ValueError, match="nested too deeply"):
        RunConfig.from_json("[" * 100_000)


def test_differing_fields_names_both_values() -> None:
    a = RunConfig.from_dict({"model": MODEL, "training": {"steps": 5}})
    b = RunConfig.from_dict(
        {"model": MODEL | {"num_kv_heads": 1}, "training": {"steps": 6}, "mesh": {"data": 2}}
    )
    assert differing_fields(a, b) == ["model.num_kv_heads: 'not set', 1", "training.steps: 5, 6"]
    assert differing_fields(a, b, ignored=CHANGEABLE_ON_RESUME) == ["model.num_kv_heads: 'not set', 1"]
