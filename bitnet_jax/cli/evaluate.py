"""Measure bits per byte and perplexity on held-out text, or scores on benchmark tasks.

The default task `language` measures held-out text: that of --source, or of a run's own data, or of Python's standard
library. Other tasks read files below $BITNET_JAX_DATA or --data-root:

  choices           arc_challenge arc_easy hellaswag openbookqa piqa social_iqa winogrande
  language          blimp (minimal pairs), lambada (last words)
  classes           sst2 trec banking77 cola sms_spam
  summaries         scitldr (optional package rouge-score)

A classifier (num_classes) is measured on the held-out examples of its run, or on --source: JSON lines, or a folder
of MNIST files. A text classifier can also run the tasks listed as classes. Scores of tasks and classifiers have a
95 % interval over their examples; bits per byte have none. --harness runs tasks of lm-evaluation-harness instead,
with its data (optional package lm-eval).

example:
  bitnet-jax eval runs/first-packed --source texts/ --split all --stride 32 --json figures.json
  bitnet-jax eval runs/first-packed --tasks blimp,lambada,arc_easy --limit 500 --json tasks.json
  bitnet-jax eval runs/cnn-packed --source vision/mnist
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import adapter_argument, allow_download_argument, model_argument, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    model_argument(command)
    adapter_argument(command)
    command.add_argument(
        "--tasks",
        metavar="NAME[,NAME...]",
        help="what to measure (default: language, or classification for a classifier)",
    )
    command.add_argument(
        "--harness", metavar="NAME[,NAME...]", help="tasks of lm-evaluation-harness, instead of --tasks"
    )
    command.add_argument(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="for --harness: a folder with .yaml files of more tasks",
    )
    command.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="use N evenly spaced records of each file (--harness: the first N)",
    )
    command.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the task files (default: $BITNET_JAX_DATA)",
    )
    command.add_argument("--quiet", action="store_true", help="do not show progress")
    command.add_argument(
        "--source",
        help="for language: stdlib, a file, a folder, or hf:NAME; for classification: as data.source of a run",
    )
    command.add_argument(
        "--split",
        choices=("document", "tail", "record", "all"),
        help="how text is held out; all: use all text",
    )
    command.add_argument(
        "--valid-fraction", type=float, metavar="X", help="fraction of the text that is held out"
    )
    command.add_argument(
        "--length",
        type=int,
        metavar="T",
        help="for language: tokens per window (default: the training sequence length; if unknown, the model's "
        "maximum)",
    )
    command.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="for language: a window every N tokens; each token is scored once, with at least T - N tokens of context "
        "(default: T, adjacent windows)",
    )
    command.add_argument("--max-tokens", type=int, metavar="N", help="score only the first N tokens")
    command.add_argument(
        "--skip-bad-files",
        action="store_true",
        help="for language: skip files of a folder that cannot be read",
    )
    allow_download_argument(command)
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.data.text import ROOT_VARIABLE, resolve_path
    from bitnet_jax.evaluation.likelihood import TextModel
    from bitnet_jax.evaluation.tasks import TASKS, describe, run_task
    from bitnet_jax.model_folders import load_model, text_model, with_adapter_files
    from bitnet_jax.models import text_config
    from bitnet_jax.names import check_name

    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    for name in names:
        check_name("--tasks", name, ("language", "classification", *TASKS))
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"got --limit {args.limit}, expected at least 1 record")
    for name in names:
        for file in TASKS[name].files if name in TASKS else ():
            expected = f"the data of task {name}; pass its folder as --data-root or in ${ROOT_VARIABLE}"
            resolve_path(file, args.data_root, expected)
    model: Any = load_model(args.folder, step=args.step)
    if args.adapter:
        model = with_adapter_files(text_model(model), args.folder, args.adapter)
    classifier = bool(getattr(model.config, "num_classes", 0))
    names = names or ["classification" if classifier else "language"]
    if names == ["classification"] and not args.harness:
        figures = _classification_figures(args, model)
        write_json(args.json, figures)
        print("\n".join(describe("classification", figures)))
        return 0
    config = text_config(model.config)
    if model.tokenizer is None:
        raise ValueError(f"got {args.folder} without tokenizer.json, expected one to tokenize text; add it")
    scored = TextModel(config, model.variables, model.tokenizer, model.conversation)
    how = {"limit": args.limit, "progress": not args.quiet}
    if args.harness:
        from bitnet_jax.evaluation.lm_harness import run_harness

        results = run_harness(scored, args.harness.split(","), include_path=args.include_path, **how)
        write_json(args.json, results)
        print(json.dumps(results, indent=2, default=str))
        return 0
    figures = {}
    for name in names:
        if name == "language":
            figures[name] = _language_figures(args, model)
            print(_describe_language(figures[name]))
        elif name == "classification":
            figures[name] = _classification_figures(args, model)
            print("\n".join(describe(name, figures[name])))
        else:
            figures[name] = run_task(scored, name, root=args.data_root, **how)
            print("\n".join(describe(name, figures[name])))
        # Written after each task: the next one may take hours.
        write_json(args.json, figures["language"] if names == ["language"] else figures)
    return 0


def _language_figures(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    from bitnet_jax.data import MeasuredStream, load_corpus, load_stream
    from bitnet_jax.evaluation.language import evaluate_text
    from bitnet_jax.training.config_sections import DataConfig
    from bitnet_jax.training.run_folder import RunFolder

    own = RunFolder(args.folder).read_config().data if model.kind == "run" else DataConfig()
    data = own if args.source is None else DataConfig(source=args.source)
    if data.mixture is not None:
        raise ValueError(
            f"got a run on the sources {', '.join(data.sources)}, expected --source with one of them"
        )
    split = args.split or data.split
    reading: dict[str, Any] = {
        "root": data.root,
        "skip_bad_files": args.skip_bad_files or data.skip_bad_files,
        "allow_download": args.allow_download or None,
    }
    if split == "all":
        stream = load_stream(data.source, model.tokenizer, **reading)
    else:
        corpus = load_corpus(
            data.source,
            tokenizer=model.tokenizer,
            split=split,
            valid_fraction=data.valid_fraction if args.valid_fraction is None else args.valid_fraction,
            valid_source=data.valid_source,
            test=data.test,
            **reading,
        )
        stream = MeasuredStream(corpus.valid, corpus.valid_token_bytes)
    began = time.perf_counter()
    length = model.config.known_length if args.length is None else args.length
    score = evaluate_text(
        model.config,
        model.variables,
        stream.tokens,
        stream.token_bytes,
        length=length,
        stride=args.stride,
        max_tokens=args.max_tokens,
    )
    return score.summary() | {
        "length": length,
        "stride": length if args.stride is None else args.stride,
        "source": data.source,
        "split": split,
        "seconds": time.perf_counter() - began,
    }


def _classification_figures(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Figures on held-out examples, with the labels, truncation and normalization used in training."""
    from bitnet_jax.data import whole_batches
    from bitnet_jax.evaluation.classifiers import score_classifier

    if not getattr(model.config, "num_classes", 0):
        raise ValueError(
            f"got {args.folder}, a language model, expected a classifier for --tasks classification"
        )
    if model.classes is None:
        raise ValueError(
            f"got {args.folder} without classes.json, which names its classes; train and pack it again"
        )
    began = time.perf_counter()
    examples, source = _held_out_examples(args, model)
    count = len(examples["targets"])
    if args.limit is not None:
        chosen = range(count) if args.limit >= count else [i * count // args.limit for i in range(args.limit)]
        examples = {name: array[list(chosen)] for name, array in examples.items()}
    batches = whole_batches(examples, min(256, len(examples["targets"])))
    figures = score_classifier(model.config, model.variables, batches).result().figures()
    return figures | {"source": source, "limit": args.limit, "seconds": time.perf_counter() - began}


def _held_out_examples(args: argparse.Namespace, model: Any) -> tuple[dict[str, Any], str]:
    """Held-out inputs and targets of the model's own data or of --source, and the name of the source."""
    from bitnet_jax.data import load_images, load_labelled_text
    from bitnet_jax.training.config import data_config

    classes, own = model.classes, data_config(model.classes.data)
    data = (
        own
        if args.source is None
        else dataclasses.replace(own, source=args.source, valid_source=None, root=None)
    )
    if classes.task == "images":
        if args.split is not None:
            raise ValueError(
                f"got --split {args.split}, expected none: image sources define what is held out"
            )
        held_out = load_images(
            data.source,
            size=data.image_size,
            root=data.root,
            pixels=classes.pixels,
            test_with_valid=data.valid_fraction if data.test and args.source is None else None,
        ).valid
        expected = tuple(getattr(model.config, name) for name in ("image_size", "image_size", "channels"))
        if held_out.images.shape[1:] != expected or held_out.labels.max() >= len(classes.names):
            raise ValueError(
                f"{data.source}: got images of {held_out.images.shape[1:]} and classes up to {held_out.labels.max()}, "
                f"expected {expected} and {len(classes.names)} classes"
            )
        return {"inputs": held_out.images, "targets": held_out.labels}, data.source
    if args.split not in (None, "all"):
        raise ValueError(
            f"got --split {args.split}, expected all or none: labelled texts are held out by hash"
        )
    texts = load_labelled_text(
        data.source,
        length=classes.length,
        tokenizer=model.tokenizer,
        valid_source=data.source if args.split == "all" else data.valid_source,
        valid_fraction=args.valid_fraction or data.valid_fraction,
        test=data.test and args.source is None and args.split != "all",
        root=data.root,
        classes=classes.names,
    )
    return texts.valid, data.source


def _describe_language(figures: dict[str, Any]) -> str:
    return (
        f"{figures['bits_per_byte']:.4f} bits per byte, perplexity {figures['perplexity']:.3f} per token "
        f"({figures['tokens']} tokens in windows of {figures['length']}, {figures['text_bytes']} bytes of "
        f"{figures['source']}, {figures['split']})"
    )
