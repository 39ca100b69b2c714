"""Evaluation tasks by name: files below the data folder, record fields, prompt and metric.

Prompts are those of lm-evaluation-harness if it has the task, so that results are comparable.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bitnet_jax.data.records import STRINGS, read_records
from bitnet_jax.evaluation.classification import classification
from bitnet_jax.evaluation.lambada import last_word
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.minimal_pairs import minimal_pairs
from bitnet_jax.evaluation.multiple_choice import fill_in, multiple_choice
from bitnet_jax.evaluation.result import Result
from bitnet_jax.evaluation.summarization import summarization


@dataclasses.dataclass(frozen=True)
class Task:
    files: tuple[str, ...]
    fields: Mapping[str, Any]  # see data.records.read_records
    measure: Callable[..., Result]  # (model, records, progress=...)


_QUESTION = {"question": str, "choices": STRINGS, "label": int}


def _choices(file: str, template: str, fields: Mapping[str, Any] = _QUESTION) -> Task:
    return Task((f"zeroshot/{file}.jsonl.gz",), fields, partial(multiple_choice, template=template))


def _classes(
    files: Sequence[str],
    template: str,
    words: Mapping[Any, str] | None = None,
    label: type = int,
    metrics: Sequence[str] = ("macro_f1", "matthews"),
) -> Task:
    measure = partial(classification, template=template, words=words, metrics=metrics)
    return Task(tuple(f"classify/{file}.jsonl.gz" for file in files), {"text": str, "label": label}, measure)


TASKS: dict[str, Task] = {
    "arc_challenge": _choices("arc_challenge.test", "Question: {question}\nAnswer:"),
    "arc_easy": _choices("arc_easy.test", "Question: {question}\nAnswer:"),
    "hellaswag": _choices("hellaswag.valid", "{ctx}", {"ctx": str, "choices": STRINGS, "label": int}),
    "openbookqa": _choices("openbookqa.test", "{question}"),
    "piqa": _choices("piqa.valid", "Question: {question}\nAnswer:"),
    "social_iqa": _choices("social_i_qa.valid", "Q: {question}\nA:"),
    "winogrande": Task(("zeroshot/winogrande.valid.jsonl.gz",), _QUESTION, fill_in),
    "lambada": Task(("zeroshot/lambada_openai.test.jsonl.gz",), {"text": str}, last_word),
    "blimp": Task(
        ("zeroshot/blimp.jsonl.gz",),
        {"paradigm": str, "term": str, "good": str, "bad": str},
        minimal_pairs,
    ),
    "sst2": _classes(
        ["sst2.test"],
        "{text}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        {0: "negative", 1: "positive"},
        metrics=("f1", "matthews"),
    ),
    "trec": _classes(
        ["trec.test"],
        "Question: {text}\nThe answer is:",
        {
            "ABBR": "an abbreviation",
            "DESC": "a description",
            "ENTY": "a thing",
            "HUM": "a person",
            "LOC": "a place",
            "NUM": "a number",
        },
        str,
    ),  # fmt: skip
    "banking77": _classes(["banking77.test"], "Customer: {text}\nTopic:", None, str),
    "cola": _classes(
        ["cola.valid", "cola.valid_out_of_domain"],
        "{text}\nQuestion: Does this sentence make sense?\nAnswer:",
        {0: "no", 1: "yes"},
        metrics=("matthews", "f1"),
    ),
    "sms_spam": _classes(
        ["sms_spam.all"],
        "Message: {text}\nIs this spam?",
        {"ham": "no", "spam": "yes"},
        str,
        ("f1", "matthews"),
    ),
    "scitldr": Task(
        ("summarize/scitldr_a.test.jsonl.gz",), {"source": STRINGS, "target": STRINGS}, summarization
    ),
}


def run_task(
    model: TextModel,
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The results of one task: Result.figures, seconds and the files.

    Args:
      root: the data folder; None: the current folder, then $BITNET_JAX_DATA.
      limit: number of records per file, spread evenly over it.

    Raises:
      DataError: see data.records.read_records and the function of the task.
    """
    task = TASKS[name]
    records = [r for file in task.files for r in read_records(file, task.fields, root, limit)]
    began = time.perf_counter()
    result = task.measure(model, records, progress=progress)
    return result.figures() | {
        "files": list(task.files),
        "limit": limit,
        "seconds": time.perf_counter() - began,
    }


def describe(name: str, figures: Mapping[str, Any]) -> list[str]:
    """The task and its baselines, then one line per metric with its interval."""
    without = "".join(f", {value:.3f} {key} without a model" for key, value in figures["baselines"].items())
    lines = [f"{name}: {figures['examples']} examples{without}"]
    for metric, estimate in figures["metrics"].items():
        low, high = estimate["interval_95"]
        lines.append(f"  {metric:10} {estimate['value']:.4g} [{low:.4g}, {high:.4g}]")
    return lines
