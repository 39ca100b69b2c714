"""Merge an adapter into its packed model: a new folder, which needs no adapter.

Layers of floats hold the sum exactly, up to rounding. A quantized layer rounds it to its codes, which may lose all of
the adapter: then nothing is written, and the message says how many codes would change and how much of the change would
be lost. --requantize writes the folder all the same, and reports the KL divergence of the merged model from the model
with its adapter, on --source.

example:
  bitnet-jax merge smollm2-float support.safetensors smollm2-support
  bitnet-jax merge smollm2-int8 support.safetensors smollm2-support --requantize --json merge.json
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="the packed model of the adapter")
    command.add_argument("adapter", metavar="FILE[:WEIGHT]", help="the adapter, times WEIGHT")
    command.add_argument("target", type=Path, metavar="FOLDER", help="new folder for the merged model")
    command.add_argument("--requantize", action="store_true", help="merge quantized layers too")
    command.add_argument("--source", help="text on which the KL divergence is measured (default: stdlib)")
    command.add_argument("--rows", type=int, default=4, help="... its rows of tokens (default %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing packed model")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.model_folders import load_text_model, weighted_adapters, with_adapter_files
    from bitnet_jax.packed import storage
    from bitnet_jax.progress import progress_bar
    from bitnet_jax.tools import agreement
    from bitnet_jax.tools.merge_adapter import merge, summary
    from bitnet_jax.tools.pack_model import prove_and_save
    from bitnet_jax.tools.text_rows import LENGTH, text_rows

    if args.rows < 1:
        raise ValueError(f"got --rows {args.rows}, expected at least 1")
    storage.check_target(args.target, args.overwrite)
    model = load_text_model(args.model)
    ((adapter, weight),) = weighted_adapters(model, args.model, [args.adapter])
    adapter = adapter._replace(scale=adapter.scale * weight)
    tokens = text_rows(model, args.source, args.rows, min(LENGTH, model.config.max_length))
    with progress_bar(len(adapter.layers), unit="layer", description="merging") as bar:
        merged, survived = merge(model, adapter, bar.update)
    figures: dict[str, Any] = summary(survived)
    if figures:
        told = (
            f"{figures['changed']:,} of {figures['codes']:,} codes change ({figures['share']:.2%}), and the weights "
            f"differ from model plus adapter by {figures['lost']:.2f} times the adapter's change"
        )
        if not args.requantize:
            raise ValueError(
                f"got {args.model}, whose quantized layers round the sum: {told}; expected layers of floats. Keep the "
                "adapter beside the model (--adapter), or pass --requantize"
            )
        print(told)
    beside = with_adapter_files(model, args.model, [args.adapter])
    prove_and_save(args.target, merged, 16, args.overwrite)
    written = load_text_model(args.target)
    found = agreement.compare(agreement.logits_of(beside, tokens), written)
    figures |= {
        "layers_by_path": {path: dataclasses.asdict(one) for path, one in survived.items()},
        "kl": found.kl,
    }
    write_json(args.json, figures)
    print(
        f"{args.target}: KL(model with adapter || merged) = {found.kl:.3g} nats a token, on {found.positions} tokens"
    )
    return 0
