"""Measure bits per byte and perplexity on held-out text, or what a model scores in named tasks.

The task `language`, which is the default, measures held-out text: without --source that of a run's own data,
for other folders of the standard library. The others read files below $BITNET_JAX_DATA or --data-root:

  choices           arc_challenge arc_easy hellaswag openbookqa piqa social_iqa winogrande
  language          blimp (minimal pairs), lambada (last words)
  classes           sst2 trec banking77 cola sms_spam
  summaries         scitldr (needs pip install 'bitnet-jax[summarization]')

A classifier (num_classes) can do those of classes. Each figure has a 95 % interval over its examples.
--harness runs tasks of lm-evaluation-harness instead, with its data (pip install 'bitnet-jax[harness]').

example:
  bitnet-jax eval runs/first-packed --source texts/ --split all --stride 32 --json figures.json
  bitnet-jax eval runs/first-packed --tasks blimp,lambada,arc_easy --limit 500 --json tasks.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a packed model, a run, or a Hugging Face model"
    )
    command.add_argument(
        "--tasks", default="language", metavar="NAME[,NAME...]", help="what to measure (default %(default)s)"
    )
    command.add_argument(
        "--harness", metavar="NAME[,NAME...]", help="tasks of lm-evaluation-harness, in place of --tasks"
    )
    command.add_argument(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="of --harness: a folder with .yaml files of more tasks",
    )
    command.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="N records of each file, spread over it (--harness: the first N)",
    )
    command.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="where the files of tasks are (default: $BITNET_JAX_DATA)",
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.add_argument("--source", help="of language: stdlib, a file, a folder, or hf:NAME")
    command.add_argument(
        "--split", choices=("document", "tail", "record", "all"), help="what is held out; all: no part"
    )
    command.add_argument(
        "--valid-fraction", type=float, metavar="X", help="share of the text that is held out"
    )
    command.add_argument(
        "--length",
        type=int,
        metavar="T",
        help="of language: tokens of a window (default: those of a training sequence; where that is unknown, the "
        "model's longest)",
    )
    command.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="of language: a window every N tokens, each token scored once and with T - N or more in front "
        "(default: T, windows side by side)",
    )
    command.add_argument("--max-tokens", type=int, help="look at so many tokens only")
    command.add_argument("--step", type=int, help="of a run: this checkpoint instead of the newest")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.evaluation.likelihood import TextModel
    from bitnet_jax.evaluation.tasks import TASKS, describe, run_task
    from bitnet_jax.model_folders import load_model

    names = [name.strip() for name in args.tasks.split(",")]
    if unknown := [name for name in names if name not in ("language", *TASKS)]:
        raise ValueError(f"got --tasks {', '.join(unknown)}, expected some of language, {', '.join(TASKS)}")
    model = load_model(args.folder, step=args.step)
    if model.tokenizer is None:
        raise ValueError(
            f"got {args.folder} without tokenizer.json, expected one that turns text into tokens; add it"
        )
    text_model = TextModel(model.config, model.variables, model.tokenizer)
    how = {"limit": args.limit, "progress": not args.quiet}
    if args.harness:
        from bitnet_jax.harness import run_harness

        results = run_harness(text_model, args.harness.split(","), include_path=args.include_path, **how)
        write_json(args.json, results)
        print(json.dumps(results, indent=2, default=str))
        return 0
    figures: dict[str, Any] = {}
    for name in names:
        if name == "language":
            figures[name] = _language_figures(args, model)
            print(_describe_language(figures[name]))
        else:
            figures[name] = run_task(text_model, name, root=args.data_root, **how)
            print("\n".join(describe(name, figures[name])))
        # After each task: the next one may take hours.
        write_json(args.json, figures["language"] if names == ["language"] else figures)
    return 0


def _language_figures(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    from bitnet_jax.data import load_corpus, read_documents, token_stream
    from bitnet_jax.evaluation.language import evaluate_text
    from bitnet_jax.training.config import DataConfig
    from bitnet_jax.training.run_folder import RunFolder

    own = RunFolder(args.folder).read_config().data if model.kind == "run" else DataConfig()
    data = own if args.source is None else DataConfig(source=args.source)
    split = args.split or data.split
    if split == "all":
        tokens = token_stream(read_documents(data.source, data.root).documents, model.tokenizer)
    else:
        tokens = load_corpus(
            data.source,
            tokenizer=model.tokenizer,
            split=split,
            valid_fraction=data.valid_fraction if args.valid_fraction is None else args.valid_fraction,
            valid_source=data.valid_source,
            root=data.root,
        ).valid
    began = time.perf_counter()
    length = model.config.known_length if args.length is None else args.length
    score = evaluate_text(
        model.config,
        model.variables,
        tokens,
        model.tokenizer,
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


def _describe_language(figures: dict[str, Any]) -> str:
    return (
        f"{figures['bits_per_byte']:.4f} bits per byte, perplexity {figures['perplexity']:.3f} per token "
        f"({figures['tokens']} tokens in windows of {figures['length']}, {figures['text_bytes']} bytes of "
        f"{figures['source']}, {figures['split']})"
    )
