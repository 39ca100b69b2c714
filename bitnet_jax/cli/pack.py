"""Pack a run's weights to bits, after proving that the packed model is equal.

Works for runs of every task: language models, text classifiers and image classifiers. Nothing is written if a code
or a greedy token differs, or a logit differs by more than 1e-5 of the largest.

example:
  bitnet-jax pack runs/first runs/first-packed
  bitnet-jax pack runs/first runs/first-int8 --head int8
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from bitnet_jax.cli.shared import describe_sizes, size_figures, ternary_format_argument, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a training run")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="new folder for the packed model")
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
    ternary_format_argument(command)
    command.add_argument("--overwrite", action="store_true", help="replace an existing packed model")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.model_folders import pack_run

    if args.folder.exists() and not args.overwrite:
        raise FileExistsError(f"got {args.folder}, which exists; expected a new folder, or --overwrite")
    proof, sizes = pack_run(
        args.run_folder,
        args.folder,
        step=args.step,
        tokens=args.tokens,
        head=args.head,
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
