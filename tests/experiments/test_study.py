"""Valid contents of a study.py, combinations of arms, and validity of every committed study."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import pytest

from bitnet_experiments.claims import Claim
from bitnet_experiments.freshness import fresh_rows
from bitnet_experiments.report import TABLE, VERDICT
from bitnet_experiments.study import (
    STUDIES,
    Study,
    load_study,
    overridden,
    product,
    read_results,
    read_study,
    study_names,
    zip_,
)
from bitnet_jax.quantization.recipes import RECIPES
from experiments import real_model

pytestmark = pytest.mark.extended


def test_product_combines_and_zip_pairs() -> None:
    precisions = {"float": {"model.precision": "float32"}, "ternary": {"model.precision": "bitnet_b158"}}
    widths = zip_(["narrow", "wide"], model__hidden_size=[32, 64], model__ffn_size=[96, 192])
    assert widths["wide"] == {"model.hidden_size": 64, "model.ffn_size": 192}
    arms = product(widths, precisions)
    assert list(arms) == ["narrow-float", "narrow-ternary", "wide-float", "wide-ternary"]
    assert arms["wide-ternary"] == {
        "model.hidden_size": 64, "model.ffn_size": 192, "model.precision": "bitnet_b158",
    }  # fmt: skip
    with pytest.raises(ValueError, match="got 1 values of model__hidden_size, expected 2"):
        zip_(["a", "b"], model__hidden_size=[1])


def test_overrides_reach_the_config_and_do_not_modify_the_base(study: Study) -> None:
    base = {"seed": 0, "model": {"hidden_size": 16}}
    assert overridden(base, {"seed": 3, "model.ffn_size": 8}) == {
        "seed": 3, "model": {"hidden_size": 16, "ffn_size": 8},
    }  # fmt: skip
    assert base == {"seed": 0, "model": {"hidden_size": 16}}
    config = study.settings("ternary", 1)
    assert config.seed == 1
    assert config.model["precision"] == [["*o_proj", "float32"], ["*", "bitnet_b158"]]
    assert study.settings("float32", 7, small=True).training.steps == 2
    shared = dataclasses.replace(study, common={"training.steps": 3, "model.precision": "int8"})
    assert shared.settings("float32", 0).training.steps == 3
    assert shared.settings("float32", 0).model["precision"] == "float32", (
        "an arm takes precedence over the settings of all arms"
    )
    assert shared.settings("float32", 7, small=True).training.steps == 2, (
        "and so do the settings of a small run"
    )
    wrong = dataclasses.replace(study, arms={"float32": {"training.stepz": 1}}, small_arms=None)
    with pytest.raises(ValueError, match="field of training: got 'stepz', .*did you mean 'steps'"):
        wrong.settings("float32", 0)


def test_runs_are_named_by_arm_and_seed(study: Study) -> None:
    assert list(study.runs())[:4] == ["float32-seed0", "broken-seed0", "ternary-seed0", "float32-seed1"]
    assert study.runs(small=True) == {"float32-seed7": ("float32", 7)}
    assert pickle.loads(pickle.dumps(study)).arms == study.arms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('TASK = "chess"', "task: got 'chess', expected one of language modelling, image classification"),
        ('BASELINE = "float"', "arm: got 'float', expected one of float32"),
        ("SEED = 1", "missing nothing, unknown SEED"),
        ("del METRIC", "missing METRIC, unknown nothing"),
        ("CONFIG = None", "neither CONFIG nor run"),
        ("SEEDS = ()", "3 arms and 0 seeds"),
    ],
)
def test_errors_name_the_mistake(study: Study, change: str, message: str) -> None:
    file = study.folder / "study.py"
    file.write_text(f"{file.read_text()}\n{change}\n")
    with pytest.raises(ValueError, match=message):
        read_study(study.folder)


def test_claims_are_about_arms_of_the_study(study: Study) -> None:
    claim = Claim(says="x", contrast=("a", "float32"), less_than=0)
    with pytest.raises(ValueError, match="arm: got 'a', expected one of float32, broken, ternary"):
        dataclasses.replace(study, claims=(claim,))


def test_errors_name_unknown_studies_and_damaged_results(study: Study) -> None:
    with pytest.raises(ValueError, match="study: got 'nothing', expected one of .*ternary_penalty"):
        load_study("nothing")
    with pytest.raises(ValueError, match="did you mean 'ternary_penalty'?"):
        load_study("ternary_penalti")
    study.results.write_text("not json\n{}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:1 is not JSON"):
        read_results(study.results)


@pytest.mark.parametrize("name", study_names())
def test_committed_rows_have_the_settings_of_their_study(name: str) -> None:
    """A new field, or a changed default, must not make them stale."""
    study = load_study(name)
    _, stale = fresh_rows(study, read_results(study.results))
    assert not stale


@pytest.mark.parametrize("name", study_names())
def test_every_arm_of_a_committed_study_is_a_valid_run(name: str) -> None:
    """Both small and full."""
    study = load_study(name)
    if study.config is not None:
        for small in (False, True):
            for arm, seed in study.runs(small).values():
                config = study.settings(arm, seed, small)
                if config.task != "images":
                    config.model_config(config.model.get("vocab_size", 256))
                assert not small or config.data.source in ("stdlib", "drawn", "keywords"), (
                    "small settings use only data available everywhere"
                )
    assert len(study.seeds) >= 3


def test_every_recipe_is_part_of_a_study() -> None:
    studies = [study for study in map(load_study, study_names()) if study.config]
    models = [study.settings(arm, 0, small=False).model for study in studies for arm in study.arms]
    rules = [model[name] for model in models for name in ("precision", "first", "last") if name in model]
    recipes = [r for rule in rules for _, r in (rule if isinstance(rule, list | tuple) else [("*", rule)])]
    named = {recipe.partition("(")[0] for recipe in recipes if isinstance(recipe, str)}
    rounded = {arm["recipe"] for arm in real_model.OURS.values() if "recipe" in arm}  # without training
    assert set(RECIPES) <= named | rounded


def test_the_study_of_the_documentation_is_complete(tmp_path: Path) -> None:
    text = (STUDIES.parent / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "my_question"
    folder.mkdir()
    (folder / "study.py").write_text(block)
    own = read_study(folder)
    for arm in own.arms:
        own.settings(arm, 0, overrides={"optimizer.learning_rate": 0.004})
    for marker in (*VERDICT, *TABLE):
        assert marker in text
