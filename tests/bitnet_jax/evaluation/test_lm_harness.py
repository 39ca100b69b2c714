"""lm-evaluation-harness on our models agrees with our own evaluation, on tasks and data generated here."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.data import ByteTokenizer, DataError
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.evaluation import lm_harness as harness
from bitnet_jax.evaluation.completion import complete
from bitnet_jax.evaluation.likelihood import Request, TextModel, score_requests, score_texts
from bitnet_jax.evaluation.multiple_choice import multiple_choice
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing, storage
from bitnet_jax.tools import lm_eval_model

ROOT = Path(__file__).resolve().parents[3]

CONFIG = ModelConfig(vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, max_length=64)
TEMPLATE = "Question: {question}\nAnswer:"
RECORDS = [
    {
        "question": f"What is {i}?",
        "choices": [f"number {i}", "a word", "nothing of that sort"],
        "label": i % 3,
    }
    for i in range(12)
]
CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING_TASK = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


class Asked:
    """A request of the harness, reduced to the attributes that a model reads."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def model() -> TextModel:
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, params)
    return TextModel(CONFIG, packing.pack(params, CONFIG), ByteTokenizer())


@pytest.fixture
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval", reason="no package lm-eval: pip install lm-eval")


def test_the_three_kinds_of_requests(model: TextModel, lm_eval: Any) -> None:
    made = harness.HarnessModel(model)
    pairs = [("", "Begin"), ("a question:", " an answer"), ("x" * 90, " end")]
    expected = [(score.log_probability, score.greedy) for score in score_texts(model, pairs)]
    assert made.loglikelihood([Asked(*pair) for pair in pairs]) == expected
    text = "word " * 40  # several windows
    tokens = np.frombuffer(f"\0{text}".encode(), np.uint8).astype(np.int32)
    rolling = score_requests(model, [Request(tokens, 1)])[0].log_probability
    assert made.loglikelihood_rolling([Asked(text)]) == [rolling]
    settings = [{"until": ["\n"], "max_gen_toks": 5}, {"until": "q"}, {"until": ["\n"], "max_gen_toks": 5}]
    prompts = ["one", "two", "three"]
    encoded = [np.concatenate([[0], ByteTokenizer().encode(prompt)]) for prompt in prompts]
    alone = [
        complete(model, [ids], n, stop=stop)[0]
        for ids, n, stop in zip(encoded, (5, 32, 5), ("\n", "q", "\n"), strict=True)
    ]
    assert made.generate_until([Asked(*pair) for pair in zip(prompts, settings, strict=True)]) == alone
    assert made.loglikelihood_rolling([Asked("")]) == [0.0]
    assert "256" in made.tokenizer_name
    named = model._replace(conversation=Conversation(end=(1,)))
    assert harness.HarnessModel(named).tokenizer_name != made.tokenizer_name  # caches are kept apart
    with pytest.warns(UserWarning, match="exceed the 64 positions"):
        made.generate_until([Asked("x" * 70, {"max_gen_toks": 3})])


def test_tasks_on_local_data_agree_with_our_own_scores(
    model: TextModel,
    lm_eval: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)))
    for name, text in (("choice", CHOICE_TASK), ("rolling", ROLLING_TASK)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    storage.save_packed(tmp_path / "packed", model.variables, CONFIG, model.tokenizer)
    arguments = ["eval", f"{tmp_path}/packed", "--harness", "tiny_choice,tiny_rolling", "--quiet"]
    assert cli.main([*arguments, "--include-path", str(tmp_path), "--json", f"{tmp_path}/out.json"]) == 0
    results = json.loads((tmp_path / "out.json").read_text())

    ours = multiple_choice(model, RECORDS, template=TEMPLATE).metrics
    assert results["tiny_choice"]["acc,none"] == pytest.approx(ours["acc"].value)
    assert results["tiny_choice"]["acc_norm,none"] == pytest.approx(ours["acc_norm"].value)
    scores = score_texts(model, [("", record["question"]) for record in RECORDS])
    nats = -sum(score.log_probability for score in scores)
    text_bytes = sum(len(record["question"].encode()) for record in RECORDS)
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / text_bytes)

    assert cli.main([*arguments[:2], "--harness", "no_such_task"]) == 2
    assert "got the harness tasks no_such_task" in capsys.readouterr().err


def test_the_command_line_of_the_harness(
    model: TextModel, lm_eval: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m bitnet_jax.tools.lm_eval_model` is `lm_eval` with the model registered, as the entry point does."""
    storage.save_packed(tmp_path / "packed", model.variables, CONFIG, model.tokenizer)
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)))
    (tmp_path / "choice.yaml").write_text(CHOICE_TASK.replace("FILE", str(file)))
    words = [
        "--model", "bitnet_jax", "--model_args", f"pretrained={tmp_path}/packed", "--tasks", "tiny_choice",
        "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bitnet_jax.tools.lm_eval_model", *words],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{tmp_path}/cache"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tmp_path / "out").rglob("results_*.json")
    figures = json.loads(result.read_text())
    ours = multiple_choice(model, RECORDS, template=TEMPLATE).metrics
    assert figures["results"]["tiny_choice"]["acc,none"] == pytest.approx(ours["acc"].value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16", "peft": "x"}, "model_args: got dtype, peft"),
        ({"device": "cuda:1"}, "device: got cuda:1, expected cpu"),
        ({"add_bos_token": "yes"}, "add_bos_token: got 'yes'"),
        ({"prefix_token_id": 256}, "prefix_token_id: got 256, expected 0 to 255"),
    ],
)
def test_model_arguments_are_refused_by_name(
    model: TextModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    message: str,
) -> None:
    for module in (harness, lm_eval_model):
        monkeypatch.setattr(module, "check_harness", lambda: None)
    storage.save_packed(tmp_path / "packed", model.variables, CONFIG, model.tokenizer)
    with pytest.raises(harness.HarnessError, match=message):
        lm_eval_model.BitnetJax(f"{tmp_path}/packed", **arguments)
    with pytest.warns(UserWarning, match="batch_size 8 and max_batch_size None have no effect"):
        made = lm_eval_model.BitnetJax(f"{tmp_path}/packed", batch_size=8, device="cpu", add_bos_token=False)
    assert made.model.begin == ()
    assert made.prefix_token_id == 0


def test_the_entry_point_is_the_model() -> None:
    """Of the distribution that is installed, or of pyproject.toml."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "lm_eval.models"
    ]
    module, _, name = declared[lm_eval_model.NAME].partition(":")
    assert getattr(importlib.import_module(module), name) is lm_eval_model.BitnetJax


def test_the_missing_harness_is_reported(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(harness.HarnessError, match=r"pip install lm-eval"):
        harness.run_harness(model, ["arc_easy"])
    with pytest.raises(DataError, match="got a classifier"):
        harness.HarnessModel(model._replace(config=ModelConfig(**CONFIG.to_dict() | {"num_classes": 2})))
