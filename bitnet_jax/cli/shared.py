"""Arguments and figures that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        from bitnet_jax.training.metrics import finite_json

        path.write_text(json.dumps(finite_json(figures), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def ternary_format_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ternary-format",
        choices=("ternary2", "ternary5"),
        help="store ternary codes in two bits each, or five in a byte: a fifth less to read, more to decode "
        "(default: as the config says, ternary2)",
    )


def kv_format_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kv-format",
        choices=("float32", "bfloat16", "int8"),
        help="of remembered keys and values (default: the model's own dtype); int8 reads a quarter of float32",
    )


def allow_download_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-download",
        action="store_true",
        help="let a source hf:NAME be downloaded; a config alone cannot (also: BITNET_JAX_ALLOW_DOWNLOAD=1)",
    )


def size_figures(sizes: Any) -> dict[str, int]:
    return dataclasses.asdict(sizes) | {"total": sizes.total}


def describe_sizes(sizes: Any) -> str:
    packed = f"{sizes.packed:,d} packed ({sizes.packed_ratio:.3f} of bfloat16), " if sizes.packed else ""
    return f"{sizes.total:,d} bytes: {packed}{sizes.embeddings:,d} embeddings, {sizes.other:,d} other"
