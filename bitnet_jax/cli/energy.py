"""Compute operations, joules and bytes of a model; with --measure, also read joules from the machine's meters.

The energy model is that of BitNet (2310.11453): every token attends to all tokens of the text, and the output head is
listed separately. --measure generates text while reading RAPL (processors) and NVML (GPUs, optional package
nvidia-ml-py).

example:
  bitnet-jax energy --preset 2b4t --length 512 --json energy.json
  bitnet-jax energy runs/first-packed --measure
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bitnet_jax.cli.shared import kv_format_argument, model_argument, ternary_format_argument, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    model_argument(command, nargs="?")
    command.add_argument("--preset", metavar="NAME", help="or the shape of a preset: tiny, 125m, ..., 2b4t")
    command.add_argument(
        "--config", metavar="CONFIG", help="or the model of NAME[:VARIANT] or FILE.py[:VARIANT]"
    )
    command.add_argument("--recipe", metavar="NAME", help="with --preset: precision of the layers")
    command.add_argument(
        "--head", metavar="NAME", help="with --preset: format of the output head, as in `bench`"
    )
    ternary_format_argument(command)
    kv_format_argument(command)
    command.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens of the text (default %(default)s)"
    )
    command.add_argument(
        "--floats",
        choices=("float16", "float32"),
        default="float16",
        help="type that float operations are counted as (default %(default)s)",
    )
    command.add_argument(
        "--zeros",
        action="append",
        default=[],
        metavar="PATTERN=SHARE",
        help="fraction of zeros in the inputs of matching layers, which cost nothing; repeatable",
    )
    command.add_argument(
        "--measure", action="store_true", help="generate text and read the machine's energy meters"
    )
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.model_folders import load_text_model
    from bitnet_jax.tools import energy_report

    variables = None
    if args.folder is not None:
        if args.preset or args.config or args.recipe or args.head or args.ternary_format:
            raise ValueError(
                "got MODEL with --preset, --config or one of their options, expected only one of them"
            )
        model = load_text_model(args.folder, step=args.step)
        config, variables = model.config, model.variables
    else:
        shape = args.recipe, args.head, args.ternary_format
        config = energy_report.chosen_config(args.preset, args.config, *shape)
    figures = energy_report.energy_figures(
        config,
        length=args.length,
        floats=args.floats,
        kv_format=args.kv_format,
        zeros=_zero_shares(args.zeros),
    )
    if args.measure:
        figures["measured"] = energy_report.measured_figures(config, variables)
    write_json(args.json, figures)
    print(energy_report.table(figures))
    return 0


def _zero_shares(values: Sequence[str]) -> dict[str, float]:
    shares = {}
    for value in values:
        pattern, _, share = value.partition("=")
        try:
            shares[pattern] = float(share)
        except ValueError as error:
            raise ValueError(
                f"got --zeros {value}, expected PATTERN=SHARE, such as '*down_proj=0.8'"
            ) from error
    return shares
