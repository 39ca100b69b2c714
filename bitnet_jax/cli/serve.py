"""Answer requests of the OpenAI API over HTTP, many at once, each with the bytes it would get alone.

One line with the address is printed when the model is ready; in a browser it shows a chat page. Ctrl-C finishes the
answers at work and stops. Prompts and answers are not written anywhere, unless --log asks for prompts. The key may also
be in the environment variable BITNET_JAX_API_KEY, where other users of the machine do not see it.

example:
  bitnet-jax serve models/SmolLM2-135M-Instruct --port 8080 --slots 4
  bitnet-jax serve smollm2-packed --adapter support=support.safetensors    # {"model": "support"} asks for it
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bitnet_jax.cli.shared import kv_format_argument, model_argument, write_json

API_KEY = "BITNET_JAX_API_KEY"


def add_arguments(command: argparse.ArgumentParser) -> None:
    model_argument(command)
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="serve the packed model also with this adapter, as the model NAME; repeatable",
    )
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine only)"
    )
    command.add_argument("--port", type=int, default=8080, metavar="P", help="0: a free one (default 8080)")
    command.add_argument(
        "--slots", type=int, default=4, metavar="N", help="requests that run at once (default 4)"
    )
    command.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="most tokens of a prompt and its answer (default: the trained sequence length); each slot has a cache of "
        "this size",
    )
    command.add_argument(
        "--queue", type=int, default=256, metavar="N", help="requests that may wait (default 256)"
    )
    command.add_argument(
        "--prompt-lookup",
        type=int,
        default=0,
        metavar="N",
        help="while one answer is generated alone, draft N tokens a pass from earlier text; the answer is the same, "
        "sooner where it repeats its prompt",
    )
    command.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="give an answer up that takes longer, the wait for a slot included (default: no limit)",
    )
    command.add_argument("--api-key", metavar="KEY", help=f"key that clients must send (also: {API_KEY})")
    kv_format_argument(command)
    command.add_argument(
        "--log",
        choices=("requests", "prompts"),
        help="a line of JSON on stderr for each request: its tokens and times; `prompts`: also what it says",
    )
    command.add_argument("--step", type=int, help="for a run: this checkpoint instead of the newest")


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.model_folders import INSTALLED, by_adapter, folder_kind, load_text_model, source_path

    folder_kind(source_path(args.folder))  # before anything listens
    from bitnet_jax.serving.embeddings import Encoder
    from bitnet_jax.serving.engine import Engine
    from bitnet_jax.serving.http import is_loopback
    from bitnet_jax.serving.schemas import Served
    from bitnet_jax.serving.server import Server

    package = args.folder.removeprefix(INSTALLED)
    name = package if package != args.folder else Path(args.folder).resolve().name
    files = _adapters(args.adapter, name)
    api_key = os.environ.get(API_KEY) if args.api_key is None else args.api_key
    if api_key == "":  # an unset variable of a shell must not open the server
        raise ValueError("got an empty API key, expected at least one character, or no key at all")
    if api_key is None and not is_loopback(args.host):
        print(f"warning: anyone who reaches {args.host} can use the model; pass --api-key", file=sys.stderr)

    def load() -> tuple[Engine | Encoder, Served]:
        model = load_text_model(args.folder, step=args.step)
        if model.tokenizer is None:
            raise ValueError(
                f"got {args.folder} without tokenizer.json, expected one to tokenize text; add it"
            )
        if model.config.pooling != "none":
            for flag in ("adapter", "context", "kv_format", "prompt_lookup", "timeout"):
                if value := getattr(args, flag):
                    name_of = flag.replace("_", "-")
                    raise ValueError(
                        f"got --{name_of} {value} for a sentence encoder, which has no such setting"
                    )
            encoder = Encoder(
                model.config, model.variables, model.tokenizer, model.conversation, queue_limit=args.queue
            )
            encoder.warm()
            return encoder, Served(name, model.tokenizer, model.conversation, encoder.context)
        engine = Engine(
            model.config,
            model.variables,
            model.tokenizer,
            slots=args.slots,
            context=args.context,
            kv_format=args.kv_format,
            queue_limit=args.queue,
            prompt_lookup=args.prompt_lookup,
            timeout=args.timeout,
            adapters=by_adapter(model, args.folder, files),
        )
        if not engine.exact:
            print(
                "warning: the sums of this model depend on the shape of a pass, so each slot runs its own passes; a "
                "packed model answers many requests in one",
                file=sys.stderr,
            )
        engine.warm()
        return engine, Served(name, model.tokenizer, model.conversation, engine.context, engine.adapters)

    def ready(server: Server) -> None:
        engine, encoder = server.serving.engine, server.serving.encoder
        assert engine or encoder
        slots = f"{engine.slots} slots of {engine.context} tokens" if engine else "vectors of texts"
        print(f"serving {name} at {server.address} ({slots})", flush=True)

    server = Server(
        load,
        host=args.host,
        port=args.port,
        api_key=api_key,
        on_ready=ready,
        log=None if args.log is None else lambda line: print(line, file=sys.stderr, flush=True),
        log_prompts=args.log == "prompts",
    )
    try:
        server.run()
    finally:
        if server.serving.engine is not None:
            write_json(args.json, dataclasses.asdict(server.serving.engine.counters))
    return 0


def _adapters(given: Sequence[str], model: str) -> dict[str, str]:
    """Name -> file. Raises ValueError: not NAME=FILE, or a name that is taken."""
    files: dict[str, str] = {}
    for text in given:
        name, _, file = text.partition("=")
        if not name or not file:
            raise ValueError(f"got --adapter {text}, expected NAME=FILE, such as support=support.safetensors")
        if name == model or name in files:
            raise ValueError(f"got --adapter {text}, expected another name than those of other models")
        files[name] = file
    return files
