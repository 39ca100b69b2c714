"""Write the adapter of a run to a file, for use beside the packed model that it was trained with.

The file holds a and b of each adapted layer in bfloat16, as training computed with them, and the fingerprint of the
model: the packed model with the file is the model of the run. The packed model does not change, and the file fits no
other one.

example:
  bitnet-jax adapter runs/support support.safetensors
  bitnet-jax generate smollm2-packed --adapter support.safetensors --prompt "Dear customer"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bitnet_jax.cli.shared import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, metavar="RUN", help="folder of a run with config.adapter.rank")
    command.add_argument("file", type=Path, metavar="FILE", help="new file, such as support.safetensors")
    command.add_argument("--step", type=int, help="of this checkpoint instead of the newest")
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.packed.adapters import save_adapter
    from bitnet_jax.training.load import read_adapter

    adapter = read_adapter(args.source, args.step)
    save_adapter(args.file, adapter, overwrite=args.overwrite)
    rank = max(len(a) for a, _ in adapter.layers.values())
    figures = {
        "layers": len(adapter.layers),
        "rank": rank,
        "scale": adapter.scale,
        "base": adapter.base,
        "bytes": args.file.stat().st_size,
    }
    write_json(args.json, figures)
    print(
        f"{args.file}: {figures['bytes']:,d} bytes, rank {rank} in {len(adapter.layers)} layers of {adapter.base}"
    )
    return 0
