"""Classify texts or images: the most likely label of each input, and its probability.

The inputs of a text classifier are texts; those of an image classifier are files: .npy or .npz arrays of pixels from 0
to 255, MNIST idx files, or .png, .pgm and other formats that Pillow reads (optional package pillow). Without INPUT,
each line of --file or of standard input is an input. Inputs are processed as the training data was: texts are cut to
its length, images are shrunk to its size and normalized by its mean and deviation. Output lines are label, probability
and input, separated by tabs.

example:
  bitnet-jax predict runs/text-packed "return a value" --json answers.json
  bitnet-jax predict runs/cnn-packed digits/*.png
  bitnet-jax predict runs/text-packed --format jsonl < lines.txt > answers.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import input_lines, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="MODEL", help="a run or a packed model of a classifier")
    command.add_argument("inputs", nargs="*", metavar="INPUT", help="a text, or a file with images")
    command.add_argument("--file", type=Path, metavar="FILE", help="read one input per line from FILE")
    command.add_argument(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="jsonl: one JSON object per line, with the probability of every label (default %(default)s)",
    )
    command.add_argument(
        "--resize", action="store_true", help="shrink images to the size of the training data"
    )
    command.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="inputs per batch (default %(default)s)"
    )
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.model_folders import load_model

    if args.inputs and args.file is not None:
        raise ValueError("got INPUT with --file, expected only one of them")
    if args.batch_size < 1:
        raise ValueError(f"got --batch-size {args.batch_size}, expected at least 1")
    model = load_model(args.folder, step=args.step)
    if not getattr(model.config, "num_classes", 0):
        raise ValueError(
            f"got {args.folder}, a language model, expected a classifier; use `generate` to continue text"
        )
    if model.classes is None:
        raise ValueError(
            f"got {args.folder} without classes.json, which names its classes; train and pack it again"
        )
    answer = _image_answers if model.classes.task == "images" else _text_answers
    inputs = iter(args.inputs) if args.inputs else input_lines(args.file)
    answers: list[dict[str, Any]] = []
    while part := list(itertools.islice(inputs, args.batch_size)):
        for row in answer(model, part, args):
            print(json.dumps(row) if args.format == "jsonl" else _line(row), flush=True)
            if args.json is not None:
                answers.append(row)
    write_json(args.json, {"classes": list(model.classes.names), "predictions": answers})
    return 0


def _line(row: dict[str, Any]) -> str:
    return f"{row['label']}\t{row['probability']:.4f}\t{' '.join(row['input'].split())}"


def _text_answers(model: Any, texts: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from bitnet_jax.data.labelled_text import encode_texts

    length = model.classes.length
    for text in texts:
        count = len(model.tokenizer.encode(text))
        if not count:
            raise ValueError(f"got the text {text[:40]!r}, expected at least one token")
        if count > length:
            print(
                f"cut to its first {length} of {count} tokens, as in training: {text[:40]!r}", file=sys.stderr
            )
    yield from _rows(model, texts, encode_texts(texts, model.tokenizer, length), args.batch_size)


def _image_answers(model: Any, files: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from bitnet_jax.data.image_files import model_inputs, read_images

    for file in files:
        images = read_images(Path(file), getattr(model.config, "channels", 1))
        try:
            inputs = model_inputs(images, model.classes.pixels, model.config.image_size, resize=args.resize)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        names = [file] if len(images) == 1 else [f"{file}[{i}]" for i in range(len(images))]
        yield from _rows(model, names, {"inputs": inputs}, args.batch_size)


def _rows(
    model: Any, names: list[str], examples: dict[str, Any], batch_size: int
) -> Iterator[dict[str, Any]]:
    from bitnet_jax.evaluation.classifiers import probabilities

    rows = probabilities(model.config, model.variables, examples, batch_size)
    for name, row in zip(names, rows, strict=True):
        best = int(row.argmax())
        named = {str(label): float(p) for label, p in zip(model.classes.names, row, strict=True)}
        yield {
            "input": name,
            "label": model.classes.names[best],
            "probability": float(row[best]),
            "probabilities": named,
        }
