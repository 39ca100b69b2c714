"""Continue a prompt or answer a message, printing the text as it is generated.

The prompt is read from --prompt, --file or standard input, as UTF-8 whatever the locale. The same --seed gives the
same text. The text ends at an end token of the model; --chat formats the prompt as a message with its chat template
and prints the answer alone.

example:
  bitnet-jax generate runs/first-packed --prompt "def " --temperature 0.8 --top-p 0.95 --seed 1
  bitnet-jax generate models/SmolLM2-135M-Instruct --chat --prompt "What is a ternary weight?" --tokens 100
  bitnet-jax generate models/SmolLM2-135M-Instruct --chat --file article.txt --prompt-lookup 3
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import (
    adapter_argument,
    huge_pages_argument,
    kv_format_argument,
    model_argument,
    sampling_arguments,
    sampling_config,
    utf8,
    write_json,
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    model_argument(command)
    adapter_argument(command)
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--file", type=Path, help="read the prompt from FILE")
    command.add_argument(
        "--chat",
        action="store_true",
        help="answer the prompt as a user's message, formatted with the model's chat template",
    )
    command.add_argument("--system", metavar="TEXT", help="with --chat: the system message before it")
    command.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="at most N new tokens (default 200, or what remains of the trained sequence length)",
    )
    sampling_arguments(command)
    command.add_argument(
        "--exact-head",
        action="store_true",
        help="search an int8 copy of a bfloat16 head and re-score its best rows: the same text, faster; greedy or "
        "with --top-k, without --repetition-penalty",
    )
    command.add_argument(
        "--prompt-lookup",
        type=int,
        default=0,
        metavar="N",
        help="draft N tokens, such as 3, from earlier text and check them in one pass: the same text, faster where it "
        "repeats the prompt (quotations, code, summaries)",
    )
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; repeatable"
    )
    kv_format_argument(command)
    huge_pages_argument(command)
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")


def run(args: argparse.Namespace) -> int:
    import jax

    from bitnet_jax.data.chat_template import chat_ids
    from bitnet_jax.data.conversation import prompt_ids
    from bitnet_jax.inference.exact_head import with_exact_head
    from bitnet_jax.inference.streaming import stream
    from bitnet_jax.model_folders import load_text_model, with_adapter_files
    from bitnet_jax.packed.huge_pages import on_huge_pages
    from bitnet_jax.tools.machine import chosen

    sampling = sampling_config(args)
    if args.system is not None and not args.chat:
        raise ValueError("got --system without --chat, expected both; a plain prompt has no system message")
    prompt = _prompt(args)
    model = with_adapter_files(load_text_model(args.folder, step=args.step), args.folder, args.adapter)
    if model.tokenizer is None:
        raise ValueError(f"got {args.folder} without tokenizer.json, expected one to tokenize text; add it")
    variables = on_huge_pages(model.variables).variables if args.huge_pages else model.variables
    if args.exact_head:
        variables = with_exact_head(model.config, variables)
    if args.chat:
        ids = chat_ids(model.tokenizer, model.conversation, _messages(args, prompt))
    else:
        ids = prompt_ids(model.tokenizer, model.conversation, prompt)
    # A prompt longer than the trained length may use the model's maximum, with a warning.
    room = max(model.config.known_length - len(ids), 0) or model.config.max_length - len(ids)
    began = time.perf_counter()
    chunks: list[tuple[float, int]] = []  # (seconds, tokens) of each chunk
    pieces = stream(
        model.config,
        variables,
        model.tokenizer,
        ids,
        max_new_tokens=max(1, min(200, room)) if args.tokens is None else args.tokens,
        sampling=sampling,
        key=jax.random.key(args.seed),
        conversation=model.conversation,
        stop=[utf8(word, "--stop") for word in args.stop],
        kv_format=args.kv_format,
        prompt_lookup=args.prompt_lookup,
        on_tokens=lambda count: chunks.append((time.perf_counter() - began, count)),
    )
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    figures = {
        "prompt": prompt,
        "text": text,
        "tokens": sum(count for _, count in chunks),
        "seconds": chunks[-1][0],
        "tokens_per_second": _steady_speed(chunks),
        "ran_on": [choice._asdict() for choice in chosen(model.config, model.variables)],
    }
    write_json(args.json, figures)
    print(_describe_generation(figures), file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return utf8(args.prompt, "--prompt")
    if args.file is not None:
        return _lines(utf8(args.file.read_bytes(), str(args.file)))
    if sys.stdin.isatty():
        raise ValueError("got no prompt; expected --prompt TEXT, --file FILE, or text on standard input")
    return _lines(utf8(sys.stdin.buffer.read(), "standard input"))


def _messages(args: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    system = [] if args.system is None else [{"role": "system", "content": utf8(args.system, "--system")}]
    return [*system, {"role": "user", "content": prompt}]


def _lines(text: str) -> str:
    """With "\\n" line endings, as text files are read."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _steady_speed(chunks: Sequence[tuple[float, int]]) -> float | None:
    """Tokens per second after the first two chunks, which include compilation (of prefill, then of the loop)."""
    if len(chunks) < 3:
        return None
    return sum(count for _, count in chunks[2:]) / (chunks[-1][0] - chunks[1][0])


def _describe_generation(figures: dict[str, Any]) -> str:
    speed = figures["tokens_per_second"]
    ran_on = [f"{choice['name']} ({choice['isa']})" for choice in figures["ran_on"] if choice["isa"]]
    ran_on += [f"{choice['name']}: {choice['reason']}" for choice in figures["ran_on"] if not choice["isa"]]
    return (
        f"[{figures['tokens']} tokens in {figures['seconds']:.2f} s including compilation, "
        f"{'too few to time' if speed is None else f'{speed:.1f} tokens/s after it'}; "
        f"{'packed weights on ' + ', '.join(ran_on) if ran_on else 'latent weights on XLA'}]"
    )
