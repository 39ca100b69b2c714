"""The `bitnet-jax` command: parsing, errors and exit codes. Each sub-command is a module in this package.

Exit codes: 0 success, 1 a failed check or a bug, 2 invalid input (with a one-line message), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TextIO

import bitnet_jax
from bitnet_jax.cli import (
    adapter,
    bench,
    chat,
    classify,
    convert,
    doctor,
    embed,
    energy,
    evaluate,
    generate,
    info,
    init,
    merge,
    pack,
    predict,
    report,
    runs,
    serve,
    summarize,
    sweep,
    tokenize,
    train,
    verify,
)
from bitnet_jax.cli.shared import check_json_target, use_threads
from bitnet_jax.inference.startup import collect_less, use_compilation_cache
from bitnet_jax.names import check_name, suggestion

INVALID = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
OWN_PACKAGES = ("bitnet_jax", "bitnet_kernels", "bitnet_experiments")
RESEND_SECONDS = (
    0.01  # delay before a Ctrl-C swallowed by a callback is sent again: the callback has returned by then
)

# Each module has `add_arguments(parser)`, `run(args) -> exit code`, and its --help text as docstring. Heavy imports
# are inside `run`, so that --help is fast.
COMMANDS: dict[str, ModuleType] = {
    "init": init,
    "tokenize": tokenize,
    "train": train,
    "adapter": adapter,
    "merge": merge,
    "pack": pack,
    "convert": convert,
    "verify": verify,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "predict": predict,
    "classify": classify,
    "summarize": summarize,
    "embed": embed,
    "eval": evaluate,
    "info": info,
    "bench": bench,
    "energy": energy,
    "doctor": doctor,
    "sweep": sweep,
    "report": report,
    "runs": runs,
}


def console() -> NoReturn:
    """The entry point of the command: `main`, then the end of the process.

    After an interrupt the process ends without Python's finalization. The traceback of the interrupt may live until
    then and refer to JAX's extension modules, whose deallocation crashes (SIGSEGV in nanobind's nb_module_free,
    jaxlib 0.10). So does one of several processes of a run if it fails: otherwise it waits for the others, and they for
    it.
    """
    try:
        code = main()
    except KeyboardInterrupt:  # before the work: while the parser is built
        code = _interrupted()
    if code == INTERRUPTED or (code == INVALID and _one_of_several()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _one_of_several() -> bool:
    jax = sys.modules.get("jax")  # not imported here only to ask
    return jax is not None and jax.distributed.is_initialized()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sub-command and returns the exit code."""
    _write_utf8()
    parser = build_parser()
    overrides, others = split_overrides(sys.argv[1:] if arguments is None else arguments)
    if others and not others[0].startswith("-"):
        try:
            check_name("command", others[0], COMMANDS)
        except ValueError as error:
            parser.error(str(error))
    args, unknown = parser.parse_known_args(others)
    args.overrides = overrides
    if args.run is not train.run:
        unknown += overrides
    if hasattr(args, "inputs"):  # argparse takes positional arguments in one run; these followed an option
        args.inputs += [word for word in unknown if not word.startswith("-")]
        unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        args.parser.error(
            f"got {' '.join(unknown)}, expected the options of `bitnet-jax {args.command} --help`"
            f"{_suggestion(unknown[0], args)}"
        )

    def run() -> int:
        # Fail before the work, not after it.
        check_json_target(args.json)
        if args.threads is not None:
            use_threads(args.threads)  # before JAX starts its threads
        collect_less()
        use_compilation_cache()
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return args.run(args)

    return exit_code(run, debug=args.debug)


def _suggestion(word: str, args: argparse.Namespace) -> str:
    """The option nearest to an unknown one, for the end of an error message."""
    name = word.partition("=")[0]
    if args.run is train.run and "." in name and name.startswith("--"):
        return f"; did you mean '--config.{word[2:]}'?"
    return suggestion(name, re.findall(r"--[a-z][\w-]*", args.parser.format_help()))


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits command-line arguments into overrides, each as `--config.a.b=value`, and the others.

    The value may be the next argument: `--config.a.b value`. An override without a value is left to the config parser.
    """
    overrides, others = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            others.append(word)
        elif "=" in word or not rest or rest[0].startswith("--"):
            overrides.append(word)
        else:
            overrides.append(f"{word}={rest.pop(0)}")
    return overrides, others


def exit_code(run: Callable[[], int], *, debug: bool = False) -> int:
    """The return value of `run`, or the exit code for its exception; user errors are one line on stderr.

    Args:
      debug: raise user errors too, to show their traceback.
    """
    try:
        with _resend_lost_interrupt():
            return run()
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11, within `__set_name__` of an import
            return _interrupted()
        if debug or not _is_user_error(error):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return INVALID


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


@contextlib.contextmanager
def _resend_lost_interrupt() -> Iterator[None]:
    """Sends a Ctrl-C again if it was raised in a callback whose exceptions Python prints and drops.

    JAX has such a callback in every garbage collection, where an import or a trace spends much of its time.
    """
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again = threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _write_utf8() -> None:
    """Makes any text printable: UTF-8 in an ASCII locale (LC_ALL=C); "?" for characters that other locales lack."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            name = codecs.lookup(stream.encoding).name
            if name == "ascii":
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            elif name != "utf-8":
                stream.reconfigure(errors="replace")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning as one line, without the source location, which does not help a user."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _is_user_error(error: Exception) -> bool:
    """Errors caused by input: ValueError, OSError, and the error classes defined in our packages."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.split(".")[0] in OWN_PACKAGES


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"  # instead of "[Errno 13] Permission denied: 'x'"
    return " ".join(text.split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitnet-jax",
        description="Binary and ternary Transformers: train, pack to bits, prove equal, generate.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bitnet-jax {bitnet_jax.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, details = (module.__doc__ or "").partition("\n")
        command = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=details.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to FILE")
        command.add_argument(
            "--threads", type=int, metavar="N", help="use at most N processors (default: all that it may use)"
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run, parser=command)
    return parser
