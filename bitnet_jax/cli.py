"""The `bitnet-jax` command: its words, its errors and its exit codes. What it does is in commands.py.

Exit codes: 0 done, 1 a check failed or a bug, 2 wrong input (one line says what), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import bitnet_jax
from bitnet_jax import commands

OURS = ("bitnet_jax", "bitnet_kernels")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    args.overrides = (
        [word for word in rest if word.startswith("--config.")] if args.run is commands.train else []
    )
    if unknown := [word for word in rest if word not in args.overrides]:
        parser.error(f"got {' '.join(unknown)}, expected the options of `bitnet-jax {args.command} --help`")
    try:
        # Before the work, not after it.
        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"got --json {args.json}, expected a file in a folder that exists")
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug or not _is_user_error(error):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


def _is_user_error(error: Exception) -> bool:
    """What input can cause: values and files, and every error class that we define."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.split(".")[0] in OURS


def _one_line(error: Exception) -> str:
    text = str(error)
    if (
        isinstance(error, OSError) and error.filename is not None
    ):  # "[Errno 13] Permission denied: 'x'" otherwise
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitnet-jax",
        description="Binary and ternary Transformers: train, pack to bits, prove equal, generate.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bitnet-jax {bitnet_jax.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_arguments) in COMMANDS.items():
        summary, _, details = (run.__doc__ or "").partition("\n")
        command = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=textwrap.dedent(details).strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_arguments(command)
        command.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to FILE")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
    return parser


def _train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="file with get_config()"
    )
    command.add_argument(
        "--workdir", required=True, type=Path, help="folder of the run; resumed if it holds one"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.usage = (
        "%(prog)s --config FILE.py[:VARIANT] --workdir DIR [--config.SECTION.FIELD=VALUE ...] [options]"
    )


def _pack_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a training run")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="new folder for the packed model")
    command.add_argument("--step", type=int, help="pack this checkpoint instead of the newest")
    command.add_argument(
        "--tokens", type=int, default=2000, help="greedy tokens to compare (default %(default)s)"
    )
    command.add_argument(
        "--head",
        choices=("float", "int8", "int4"),
        help="store the output head so; int8 and int4 are smaller, faster and not quite the head that was "
        "trained (default: as the run's config says)",
    )
    _ternary_format_argument(command)
    command.add_argument("--overwrite", action="store_true", help="replace a packed model that is there")


def _ternary_format_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ternary-format",
        choices=("ternary2", "ternary5"),
        help="store ternary codes in two bits each, or five in a byte: a fifth less to read, more to decode "
        "(default: as the config says, ternary2)",
    )


def _generate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a packed model, a run, or a Hugging Face model"
    )
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--file", type=Path, help="read the prompt from FILE")
    command.add_argument(
        "--tokens", type=int, help="at most so many new tokens (default 200, or what room is left)"
    )
    command.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    command.add_argument("--top-k", type=int, metavar="K", help="choose among the K most likely tokens")
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="... that make up probability P"
    )
    command.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="... at least P times the likeliest"
    )
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--exact-head",
        action="store_true",
        help="read an int8 copy of a bfloat16 head and re-score its best rows: the same text, faster; greedy or "
        "with --top-k, without --repetition-penalty",
    )
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end in front of TEXT; repeatable"
    )
    _kv_format_argument(command)
    command.add_argument("--step", type=int, help="of a run: this checkpoint instead of the newest")


def _kv_format_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kv-format",
        choices=("float32", "bfloat16", "int8"),
        help="of remembered keys and values (default: the model's own dtype); int8 reads a quarter of float32",
    )


def _evaluate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a packed model, a run, or a Hugging Face model"
    )
    command.add_argument(
        "--tasks", default="language", metavar="NAME[,NAME...]", help="what to measure (default %(default)s)"
    )
    command.add_argument(
        "--harness", metavar="NAME[,NAME...]", help="tasks of lm-evaluation-harness, in place of --tasks"
    )
    command.add_argument(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="of --harness: a folder with .yaml files of more tasks",
    )
    command.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="N records of each file, spread over it (--harness: the first N)",
    )
    command.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="where the files of tasks are (default: $BITNET_JAX_DATA)",
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.add_argument("--source", help="of language: stdlib, a file, a folder, or hf:NAME")
    command.add_argument(
        "--split", choices=("document", "tail", "record", "all"), help="what is held out; all: no part"
    )
    command.add_argument(
        "--valid-fraction", type=float, metavar="X", help="share of the text that is held out"
    )
    command.add_argument("--length", type=int, help="tokens of a window (default: the model's longest)")
    command.add_argument("--max-tokens", type=int, help="look at so many tokens only")
    command.add_argument("--step", type=int, help="of a run: this checkpoint instead of the newest")


def _info_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a packed model, a run, or a Hugging Face model"
    )
    command.add_argument("--step", type=int, help="of a run: this checkpoint instead of the newest")
    command.add_argument(
        "--verify", action="store_true", help="read all of a packed model, compare checksums"
    )


def _bench_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", metavar="NAME", help="shape of the model: tiny, 125m, ..., 100b, 2b4t")
    command.add_argument("--recipe", metavar="NAME", help="precision of its layers (default bitnet_b158)")
    command.add_argument(
        "--head",
        metavar="NAME",
        help="float, int8 or int4: form of the output head; or a recipe of one that is a matrix of its own",
    )
    _ternary_format_argument(command)
    _kv_format_argument(command)
    command.add_argument(
        "--model", type=Path, metavar="FOLDER", help="time this; made first if it does not exist"
    )
    command.add_argument(
        "--keep", action="store_true", help="do not remove the temporary folder of the weights"
    )
    command.add_argument(
        "--prompt", type=int, default=512, metavar="N", help="tokens to read (default %(default)s)"
    )
    command.add_argument(
        "--generate", type=int, default=64, metavar="N", help="tokens to write (default %(default)s)"
    )
    command.add_argument("--threads", type=int, metavar="N", help="use the first N processors (default: all)")
    command.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="time everything N times (default %(default)s)"
    )


def _energy_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="a packed model, a run, ...")
    command.add_argument("--preset", metavar="NAME", help="or the shape of a preset: tiny, 125m, ..., 2b4t")
    command.add_argument("--config", metavar="FILE.py[:VARIANT]", help="or the model of a config file")
    command.add_argument("--recipe", metavar="NAME", help="of a preset: precision of its layers")
    command.add_argument("--head", metavar="NAME", help="of a preset: form of its output head, see bench")
    _ternary_format_argument(command)
    _kv_format_argument(command)
    command.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens of the text (default %(default)s)"
    )
    command.add_argument(
        "--floats", choices=("float16", "float32"), default="float16", help="what a float counts as"
    )
    command.add_argument(
        "--zeros",
        action="append",
        default=[],
        metavar="PATTERN=SHARE",
        help="share of zeros among the inputs of these layers, which cost nothing; repeatable",
    )
    command.add_argument("--measure", action="store_true", help="generate, and read the machine's meters")
    command.add_argument("--step", type=int, help="of a run: this checkpoint instead of the newest")


def _doctor_arguments(command: argparse.ArgumentParser) -> None:
    """It takes none."""


Run = Callable[[argparse.Namespace], int]
AddArguments = Callable[[argparse.ArgumentParser], None]
COMMANDS: dict[str, tuple[Run, AddArguments]] = {
    "train": (commands.train, _train_arguments),
    "pack": (commands.pack, _pack_arguments),
    "generate": (commands.generate, _generate_arguments),
    "eval": (commands.evaluate, _evaluate_arguments),
    "info": (commands.info, _info_arguments),
    "bench": (commands.bench, _bench_arguments),
    "energy": (commands.energy, _energy_arguments),
    "doctor": (commands.doctor, _doctor_arguments),
}


if __name__ == "__main__":
    sys.exit(main())
