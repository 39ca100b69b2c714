"""Train a model from a config file, or go on with the run that the folder holds.

The config file is executed Python: use only files whose source is trusted. Its fields are overridden by
--config.SECTION.FIELD=VALUE (or with a space in place of the equals sign).

example:
  bitnet-jax train --config byte_lm:small --workdir runs/first \
      --config.training.steps=200 --config.model.precision=bitnet
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from bitnet_jax.cli.shared import allow_download_argument, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        required=True,
        metavar="CONFIG",
        help="NAME[:VARIANT] of `bitnet-jax init --list`, or FILE.py[:VARIANT] with get_config()",
    )
    command.add_argument(
        "--workdir", required=True, type=Path, help="folder of the run; resumed if it holds one"
    )
    allow_download_argument(command)
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.usage = "%(prog)s --config CONFIG --workdir DIR [--config.SECTION.FIELD=VALUE ...] [options]"


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.config_file import load_config_file
    from bitnet_jax.data.text import DOWNLOAD_VARIABLE
    from bitnet_jax.training.loop import fit

    if args.allow_download:
        os.environ[DOWNLOAD_VARIABLE] = "1"
    config = load_config_file(args.config, args.overrides)
    result = fit(config.to_dict(), args.workdir, progress=not args.quiet)
    write_json(args.json, result)
    print(json.dumps(result, indent=2))
    return 0 if result["status"] == "finished" else 1
