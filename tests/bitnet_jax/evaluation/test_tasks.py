"""Task metrics computed from hand-made likelihoods; and every task on the command line, with tiny data files."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.cli import evaluate
from bitnet_jax.cli import main as cli
from bitnet_jax.data import ByteTokenizer, DataError
from bitnet_jax.data.records import read_records
from bitnet_jax.evaluation import lambada, minimal_pairs, multiple_choice
from bitnet_jax.evaluation.likelihood import Score, TextModel
from bitnet_jax.evaluation.tasks import TASKS, describe, run_task
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing, storage

CONFIG = ModelConfig(vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, max_length=64)
QUESTION = {"question": "Which is it?", "choices": ["a long answer", "this"], "label": 1}
RECORDS: dict[str, list[dict]] = {
    "zeroshot/hellaswag.valid": [{"ctx": "Roof: A man", "choices": ["sits.", "flies {up}."], "label": 0}] * 2,
    "zeroshot/winogrande.valid": [{"question": "Ann met Bo so _ left.", "choices": ["Ann", "Bo"], "label": 0}],
    "zeroshot/lambada_openai.test": [{"text": "In the end it was the end"}, {"text": "two words"}],
    "zeroshot/blimp": [
        {"paradigm": p, "term": "t", "good": "He runs.", "bad": "He run."} for p in ("one", "two", "two")
    ],
    "classify/sst2.test": [{"text": "good", "label": 1}, {"text": "bad", "label": 0}],
    "classify/trec.test": [{"text": "Who?", "label": "HUM"}, {"text": "Where?", "label": "LOC"}],
    "classify/banking77.test": [{"text": "card?", "label": "lost_card"}, {"text": "top", "label": "top_up"}],
    "classify/cola.valid": [{"text": "It is.", "label": 1}, {"text": "Is is.", "label": 0}],
    "classify/cola.valid_out_of_domain": [{"text": "We are.", "label": 1}],
    "classify/sms_spam.all": [{"text": "win", "label": "spam"}, {"text": "hi", "label": "ham"}],
    "summarize/scitldr_a.test": [{"source": ["A cat sat.", "It slept."], "target": ["A cat slept.", "Cat."]}] * 2,
} | {
    f"zeroshot/{name}": [QUESTION] * 3
    for name in ("arc_easy.test", "arc_challenge.test", "openbookqa.test", "piqa.valid", "social_i_qa.valid")
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with a tiny file for every task, and a packed model."""
    place = tmp_path_factory.mktemp("tasks")
    for name, records in RECORDS.items():
        file = place / "data" / f"{name}.jsonl.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(json.dumps(record) for record in records)
        file.write_bytes(gzip.compress(text.encode()))
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    storage.save_packed(place / "packed", packing.pack(params, CONFIG), CONFIG, ByteTokenizer())
    return place


def told(values: dict[str, float]) -> Callable[..., list[Score]]:
    """A fake score_texts that looks up likelihoods by the end of context + continuation."""

    def score_texts(model: TextModel, pairs: list[tuple[str, str]], *, progress: bool) -> list[Score]:
        found = [next(v for end, v in values.items() if "".join(pair).endswith(end)) for pair in pairs]
        return [Score(value, 1, value > -1) for value in found]

    return score_texts


MODEL: TextModel = None  # type: ignore[assignment]  # never used when likelihoods are given


def test_acc_uses_the_likelihood_and_acc_norm_the_likelihood_per_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # "thüs": 5 bytes at -1.2 each; "a long answer": 13 bytes at -0.5 each.
    monkeypatch.setattr(multiple_choice, "score_texts", told({" thüs": -6.0, " a long answer": -6.5}))
    record = {"question": "{braces} stay?", "choices": ["a long answer", "thüs"]}
    records = [record | {"label": label} for label in (0, 1, 1)]
    result = multiple_choice.multiple_choice(MODEL, records, template="Q: {question}\nA:")
    assert result.metrics["acc"].value == pytest.approx(2 / 3)
    assert result.metrics["acc_norm"].value == pytest.approx(1 / 3)
    assert result.baselines == {"acc": 0.5}
    item = multiple_choice.question_item("Q: {question}\nA:", records[0])
    assert item.pairs[1] == ("Q: {braces} stay?\nA:", " thüs")
    assert item.lengths == (13, 5)


def test_the_blank_is_filled_in_and_the_text_after_it_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"question": "Ann met Bo so _ left.", "choices": ["Ann", "Bo"], "label": 1}
    assert multiple_choice.blank_item(record).pairs == (
        ("Ann met Bo so Ann", " left."),
        ("Ann met Bo so Bo", " left."),
    )
    monkeypatch.setattr(multiple_choice, "score_texts", told({"so Ann left.": -3.0, "so Bo left.": -2.0}))
    result = multiple_choice.fill_in(MODEL, [record, record | {"label": 0}])
    assert result.metrics["acc"].value == 0.5
    assert list(result.metrics) == ["acc"]
    for question in ("no blank", "ends with _", "_ "):
        with pytest.raises(DataError, match="expected text after a blank"):
            multiple_choice.blank_item(record | {"question": question})


def test_labels_are_choices() -> None:
    for choices, label in ((["a", "b"], 2), (["a", "b"], -1), (["a"], 0)):
        with pytest.raises(DataError, match=f"got label {label} for {len(choices)} choices"):
            multiple_choice.question_item("{question}", {"question": "", "choices": choices, "label": label})


def test_paradigms_are_weighted_equally_and_ties_count_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimal_pairs, "score_texts", told({"A": -1.0, "B": -2.0}))
    good, bad, tie = ({"good": g, "bad": b} for g, b in ("AB", "BA", "AA"))
    of_paradigms = {"x": ("one", [good, bad, tie, good]), "y": ("two", [good]), "z": ("two", [tie])}
    records = [
        pair | {"paradigm": paradigm, "term": term}
        for paradigm, (term, pairs) in of_paradigms.items()
        for pair in pairs
    ]
    result = minimal_pairs.minimal_pairs(MODEL, records)
    assert result.metrics["acc"].value == pytest.approx((0.5 + 1 + 0) / 3)
    assert result.details["acc_by_term"] == {"one": 0.5, "two": 0.5}
    assert result.details["acc_by_paradigm"] == {"x": 0.5, "y": 1.0, "z": 0.0}


def test_last_word_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambada, "score_texts", told({" sure": -0.5, " unsure": -3.5}))
    result = lambada.last_word(MODEL, [{"text": "I am sure"}, {"text": "I am unsure\n"}])
    assert result.metrics["acc"].value == 0.5
    assert result.metrics["ppl"].value == pytest.approx(math.exp(2))
    assert result.metrics["ppl"].low == pytest.approx(math.exp(0.5))
    assert lambada._cut("one  two three ") == ("one  two", " three")
    with pytest.raises(DataError, match="at least two words"):
        lambada.last_word(MODEL, [{"text": "one"}])


@pytest.mark.extended(after=5)
@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs(name: str, place: Path) -> None:
    config, variables, tokenizer, *_ = storage.load_packed(place / "packed")
    assert tokenizer is not None
    model = TextModel(config, variables, tokenizer)
    figures = run_task(model, name, root=place / "data")
    assert figures["examples"] == sum(
        len(records) for file, records in RECORDS.items() if f"{file}.jsonl.gz" in figures["files"]
    )
    for estimate in figures["metrics"].values():
        low, high = estimate["interval_95"]
        assert low <= estimate["value"] + 1e-12
        assert estimate["value"] <= high + 1e-12
    again = run_task(model, name, root=place / "data")
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    json.dumps(figures)
    assert describe(name, figures)[0].startswith(f"{name}: ")


def test_the_command(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITNET_JAX_DATA", f"{place}/data")
    (place / "text.txt").write_text("Some text. " * 20)
    arguments = ["eval", f"{place}/packed", "--quiet", "--json", f"{place}/figures.json"]
    more = [
        "--tasks",
        "language, arc_easy",
        "--limit",
        "2",
        "--source",
        f"{place}/text.txt",
        "--split",
        "all",
    ]
    assert cli.main([*arguments, *more]) == 0
    figures = json.loads((place / "figures.json").read_text())
    assert figures["arc_easy"]["examples"] == 2
    assert figures["arc_easy"]["metrics"].keys() == {"acc", "acc_norm"}
    assert figures["language"]["text_bytes"] == 220
    out = capsys.readouterr().out
    assert "arc_easy: 2 examples, 0.500 acc without a model" in out
    assert "bits per byte" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks", "arc_hard"],
            "--tasks: got 'arc_hard', expected one of language, classification, arc_challenge",
        ),
        (["--tasks", "arc_easy", "--limit", "0"], "got --limit 0, expected at least 1"),
        (
            ["--tasks", "arc_easy", "--data-root", "/nowhere"],
            "got no file or folder at /nowhere/zeroshot/arc_easy",
        ),
        (
            ["--tasks", "language,arc_easy"],
            "expected the data of task arc_easy; pass its folder as --data-root or in $BITNET_JAX_DATA",
        ),
    ],
)
def test_invalid_tasks_are_rejected(
    arguments: list[str],
    message: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BITNET_JAX_DATA", raising=False)
    assert cli.main(["eval", f"{place}/packed", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_help_names_every_task() -> None:
    assert evaluate.__doc__ is not None
    assert set(TASKS) <= set(evaluate.__doc__.replace(",", " ").split())


def test_the_real_data_files_have_the_fields_the_tasks_require(data_root: Path) -> None:
    counts = {
        name: sum(len(read_records(f, task.fields, data_root)) for f in task.files)
        for name, task in TASKS.items()
    }
    assert counts == {
        "arc_challenge": 1172, "arc_easy": 2376, "hellaswag": 10_042, "openbookqa": 500, "piqa": 1838,
        "social_iqa": 1954, "winogrande": 1267, "lambada": 5153, "blimp": 67_000, "sst2": 1821, "trec": 500,
        "banking77": 3080, "cola": 1043, "sms_spam": 5574, "scitldr": 618,
    }  # fmt: skip
    for name in ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "social_iqa"):
        records = [r for f in TASKS[name].files for r in read_records(f, TASKS[name].fields, data_root)]
        assert all(0 <= record["label"] < len(record["choices"]) for record in records)
    winogrande = read_records(TASKS["winogrande"].files[0], TASKS["winogrande"].fields, data_root)
    assert {len(multiple_choice.blank_item(record).pairs) for record in winogrande} == {2}
    passages = read_records(TASKS["lambada"].files[0], {"text": str}, data_root)
    assert np.mean([len(lambada._cut(record["text"])[1]) for record in passages]) > 3
