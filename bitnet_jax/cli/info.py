"""Show the contents of a model folder: config, recipe of each layer, size of each part, packed formats, begin and end
tokens.

The small files and the smallest tensors of a packed model, up to 256 MiB in total, are always compared with their
checksums; the largest matrices of a larger model only with --verify.

example:
  bitnet-jax info runs/first-packed --verify
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from bitnet_jax.cli.shared import describe_sizes, model_argument, size_figures, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    model_argument(command)
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")
    command.add_argument(
        "--verify", action="store_true", help="compare all tensors of a packed model with their checksums"
    )


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.model_folders import load_model, matrices
    from bitnet_jax.models import config_fields
    from bitnet_jax.packed import packing

    model = load_model(args.folder, step=args.step, verify=args.verify or None)
    sizes = packing.sizes(model.variables)
    layers = matrices(model.config, model.variables)
    config = config_fields(model.config)
    classes = model.classes
    figures = {
        "kind": model.kind,
        "config": config,
        "tokenizer": None if model.tokenizer is None else model.tokenizer.kind,
        "classes": None if classes is None else json.loads(classes.to_json()),
        "conversation": json.loads(model.conversation.to_json()),
        "matrices": layers,
        "bytes": size_figures(sizes),
    }
    if args.verify and model.kind == "packed":
        figures["verified"] = True
    write_json(args.json, figures)
    print(f"{args.folder}: {model.kind}, tokenizer {figures['tokenizer']}, {describe_sizes(sizes)}\n")
    if args.verify and model.kind == "packed":
        print("verified: every tensor has its checksum\n")
    if model.tokenizer is not None and classes is None:
        print(f"  {_describe_conversation(model.conversation)}\n")
    if classes is not None:
        print(f"  {classes.task}: {', '.join(map(str, classes.names))}")
        if classes.pixels is not None:
            mean, deviation, (height, width) = classes.pixels
            print(f"  pixels: mean {mean:.6g}, deviation {deviation:.6g}, of images of {height} x {width}")
        print()
    for name, value in config.items():
        print(f"  {name:18s} {value}")
    print(f"\n  {'matrix':34s} {'n x k':>13s}  {'recipe':22s} {'stored':18s} {'bytes':>11s}")
    for path, row in layers.items():
        shape = "{} x {}".format(*row["shape"])
        print(f"  {path:34s} {shape:>13s}  {row['recipe']:22s} {row['stored']:18s} {row['bytes']:11,d}")
    return 0


def _describe_conversation(conversation: Any) -> str:
    begin, end = (", ".join(map(str, ids)) or "none" for ids in (conversation.begin, conversation.end))
    if conversation.begin and not conversation.begins_prompts:
        begin += " (of documents, not of prompts)"
    template = "none" if conversation.template is None else f"{len(conversation.template)} characters"
    return f"begin tokens: {begin}; end tokens: {end}; chat template: {template}"
