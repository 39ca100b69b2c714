r"""Train a model from a config file, or resume the run in the folder.

The config file is Python that is executed: use only trusted files. Override its fields with
--config.SECTION.FIELD=VALUE (or with a space instead of the equals sign).

A run resumes with its original settings. Only these may change: training.log_every, eval_every, checkpoint_every,
keep_checkpoints, tensorboard and scan_layers, the sections mesh and distributed, and training.steps. With more steps, a
finished run continues from its last checkpoint; a schedule other than constant then follows the new total from there,
which is reported on stderr and recorded as extended_from in result.json. A run without a checkpoint yet can be started
again with any settings.

example:
  bitnet-jax train --config byte_lm:small --workdir runs/first \
      --config.training.steps=200 --config.model.precision=bitnet
  bitnet-jax train --config byte_lm:small --workdir runs/first \
      --config.training.steps=400 --config.model.precision=bitnet     # continues from step 200
"""

from __future__ import annotations

import argparse
import os
import sys
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
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="train from scratch: removes the run in the folder; refuses a folder that contains anything else",
    )
    command.add_argument(
        "--keep-memory",
        action="store_true",
        help="keep the memory that a step frees for the next one: faster on a CPU, more memory (glibc only)",
    )
    command.add_argument("--quiet", action="store_true", help="do not show progress")
    command.usage = "%(prog)s --config CONFIG --workdir DIR [--config.SECTION.FIELD=VALUE ...] [options]"


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.data.text import DOWNLOAD_VARIABLE
    from bitnet_jax.training.allocator import keep_freed_memory
    from bitnet_jax.training.config_file import load_config_file
    from bitnet_jax.training.distributed import is_first
    from bitnet_jax.training.loop import fit
    from bitnet_jax.training.summary import summary

    if args.keep_memory and not keep_freed_memory():
        print("--keep-memory: this system has no glibc; training without it", file=sys.stderr)
    if args.allow_download:
        os.environ[DOWNLOAD_VARIABLE] = "1"
    config = load_config_file(args.config, args.overrides)
    result = fit(config.to_dict(), args.workdir, progress=not args.quiet, overwrite=args.overwrite)
    if is_first():
        write_json(args.json, result)
        print(f"{args.workdir}\n{summary(result)}")
    return 0 if result["status"] == "finished" else 1
