"""Talk to a model in the terminal, with its chat template.

The conversation is remembered, and what a new message shares with it is not read again. Commands begin with a slash:
/help lists them. Ctrl-C ends an answer, Ctrl-D the conversation. Without a terminal every line of standard input is one
message, and only the answers are printed.

example:
  bitnet-jax chat models/SmolLM2-135M-Instruct --system "Answer in one sentence." --temperature 0.7
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bitnet_jax.cli.shared import (
    adapter_argument,
    kv_format_argument,
    model_argument,
    sampling_arguments,
    sampling_config,
    utf8,
    write_json,
)

if TYPE_CHECKING:
    from bitnet_jax.serving.engine import Engine
    from bitnet_jax.serving.terminal import Chat


def add_arguments(command: argparse.ArgumentParser) -> None:
    model_argument(command)
    adapter_argument(command)
    command.add_argument("--system", metavar="TEXT", help="the system message")
    command.add_argument("--tokens", type=int, metavar="N", help="at most N tokens in an answer")
    command.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="most tokens of the conversation (default: the trained sequence length)",
    )
    sampling_arguments(command)
    kv_format_argument(command)
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.model_folders import load_text_model, with_adapter_files
    from bitnet_jax.serving.engine import Engine
    from bitnet_jax.serving.terminal import Chat

    if args.tokens is not None and args.tokens < 1:
        raise ValueError(f"got --tokens {args.tokens}, expected at least 1")
    sampling = sampling_config(args)
    model = with_adapter_files(load_text_model(args.folder, step=args.step), args.folder, args.adapter)
    if model.tokenizer is None:
        raise ValueError(f"got {args.folder} without tokenizer.json, expected one to tokenize text; add it")
    if model.conversation.template is None:
        raise ValueError(f"got {args.folder} without a chat template, expected one; use bitnet-jax generate")
    engine = Engine(
        model.config,
        model.variables,
        model.tokenizer,
        slots=1,
        context=args.context,
        kv_format=args.kv_format,
    )
    system = None if args.system is None else utf8(args.system, "--system")
    chat = Chat(
        engine, model.conversation, system=system, sampling=sampling, seed=args.seed, max_tokens=args.tokens
    )
    with working(engine):
        if sys.stdin.isatty():
            _converse(chat)
        else:
            _answer_lines(chat)
    write_json(args.json, dataclasses.asdict(engine.counters))
    return 0


@contextlib.contextmanager
def working(engine: Engine) -> Iterator[None]:
    """The engine works in a thread, where Ctrl-C does not reach it."""
    thread = threading.Thread(target=engine.run, name="engine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        engine.close()
        thread.join()


def _answer_lines(chat: Chat) -> None:
    for line in sys.stdin.buffer:
        finished = chat.ask(utf8(line, "standard input").rstrip("\r\n"), _show)
        print()
        if finished.reason == "cancelled":
            raise KeyboardInterrupt


def _converse(chat: Chat) -> None:
    from bitnet_jax.serving.terminal import describe, turns

    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() a history and an editor
    print("/help lists the commands, Ctrl-D leaves", file=sys.stderr)
    for text in turns(_read):
        if not text.strip():
            continue
        if text.strip() == "/exit":
            return
        try:
            if text.startswith("/"):
                if said := chat.command(text):
                    print(said, file=sys.stderr)
                continue
            finished = chat.ask(text, _show)
            print(f"\n{describe(finished)}", file=sys.stderr)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # while the template is rendered
            print(file=sys.stderr)


def _read() -> str | None:
    while True:
        try:
            return input("> ")
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit leaves", file=sys.stderr)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
