"""Copy an installed config to a file for editing.

`train --config NAME` runs an installed config as it is; use a copy for changes that overrides cannot express.

example:
  bitnet-jax init byte_lm                          # writes byte_lm.py
  bitnet-jax train --config byte_lm.py:small --workdir runs/first
  bitnet-jax init --list
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from bitnet_jax.cli.shared import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", metavar="NAME", help="an installed config, see --list")
    command.add_argument("file", nargs="?", type=Path, metavar="FILE", help="file to write (default NAME.py)")
    command.add_argument("--list", action="store_true", help="list all configs with a description")
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.training.config_file import named_config, named_configs

    if args.list == (args.name is not None):
        raise ValueError(f"got {'NAME with --list' if args.list else 'no NAME'}, expected NAME or --list")
    if args.list:
        summaries = {name: _summary(file) for name, file in named_configs().items()}
        write_json(args.json, summaries)
        width = max(map(len, summaries))
        print("\n".join(f"{name:{width}s}  {summary}" for name, summary in summaries.items()))
        return 0
    text = named_config(args.name).read_text(encoding="utf-8")
    target = args.file or Path(f"{args.name}.py")
    if target.suffix != ".py":
        raise ValueError(f"got FILE {target}, expected a name that ends in .py")
    try:
        with target.open("w" if args.overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise FileExistsError(
            f"got {target}, which exists, expected a new file; use --overwrite to replace it"
        ) from error
    write_json(args.json, {"config": args.name, "file": str(target)})
    print(f"wrote {target}; bitnet-jax train --config {target} --workdir runs/{target.stem}")
    return 0


def _summary(file: Path) -> str:
    """The first line of the config's docstring, read without executing it."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
