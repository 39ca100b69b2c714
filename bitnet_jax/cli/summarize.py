"""Summarize texts with a language model on this machine, in batches.

Without TEXT, each line of --file or of standard input is a text. A model with a chat template gets --instruction and
the text as a message; one without continues the text after "TL;DR:". Answers are greedy: the same text, the same
summary. A text too long for the model is cut at its end, with a message.

example:
  bitnet-jax summarize smollm2-packed --file articles.txt --json summaries.json
  bitnet-jax summarize smollm2-packed --format jsonl < articles.txt > summaries.jsonl
  bitnet-jax summarize smollm2-packed "$(cat article.txt)" --instruction "Write a headline for this text."
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from bitnet_jax.cli.shared import adapter_argument, input_lines, model_argument, write_json

PART = 64  # texts that are read before their summaries are written


def add_arguments(command: argparse.ArgumentParser) -> None:
    model_argument(command)
    command.add_argument("texts", nargs="*", metavar="TEXT")
    adapter_argument(command)
    command.add_argument("--file", type=Path, metavar="FILE", help="read one text per line from FILE")
    command.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what a model with a chat template is told (default: one sentence)",
    )
    command.add_argument(
        "--tokens",
        type=int,
        default=60,
        metavar="N",
        help="at most N tokens in a summary (default %(default)s)",
    )
    command.add_argument(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="jsonl: one JSON object per line, with text and summary (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.evaluation.likelihood import TextModel
    from bitnet_jax.evaluation.summaries import INSTRUCTION, answered, continued
    from bitnet_jax.model_folders import load_text_model, with_adapter_files

    if args.texts and args.file is not None:
        raise ValueError("got TEXT with --file, expected only one of them")
    if args.tokens < 1:
        raise ValueError(f"got --tokens {args.tokens}, expected at least 1")
    loaded = with_adapter_files(load_text_model(args.folder), args.folder, args.adapter)
    if loaded.tokenizer is None:
        raise ValueError(f"got {args.folder} without tokenizer.json, expected one to tokenize text; add it")
    conversation = loaded.conversation
    model = TextModel(loaded.config, loaded.variables, loaded.tokenizer, conversation)
    if args.instruction is not None and conversation.template is None:
        raise ValueError(f"got --instruction for {args.folder}, which has no chat template; leave it out")
    instruction = INSTRUCTION if args.instruction is None else args.instruction
    inputs = iter(args.texts) if args.texts else input_lines(args.file)
    rows: list[dict[str, str]] = []
    while part := list(itertools.islice(inputs, PART)):
        if conversation.template is None:
            found = continued(model, part, args.tokens)
        else:
            found = answered(model, part, args.tokens, instruction=instruction)
        for i, count in found.cut.items():
            print(f"cut to its first {count} tokens: {part[i][:40]!r}", file=sys.stderr)
        for text, summary in zip(part, found.texts, strict=True):
            row = {"text": text, "summary": summary}
            print(json.dumps(row) if args.format == "jsonl" else " ".join(summary.split()), flush=True)
            rows.append(row)
    write_json(args.json, {"summaries": rows})
    return 0
