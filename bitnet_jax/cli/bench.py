"""Benchmark a packed model, by default with random weights: prefill, decoding, memory, against the machine's limits.

Random weights are written to a temporary folder, or to --model, and read back; an existing --model is timed as it is,
one of another format as a packed copy.
Ratios (to the read ceiling, to the multiplier peak, of kernels to the whole step) come from interleaved measurements;
tokens per second vary with the load of the machine. The time to the first token is measured in separate
processes, with an empty and with a filled compilation cache.

With --serve, the server instead: 1, 4, 8 and 16 clients at once over HTTP. If an answer is not the one to the same
request alone, there are no figures.

example:
  bitnet-jax bench --preset 2b4t --recipe bitnet_b158 --prompt 512 --generate 64 --threads 2 --json bench.json
  bitnet-jax bench --serve models/SmolLM2-135M-Instruct --prompt 128 --repeats 3 --json serve.json
"""

from __future__ import annotations

import argparse

from bitnet_jax.cli.shared import huge_pages_argument, kv_format_argument, ternary_format_argument, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", metavar="NAME", help="shape of the model: tiny, 125m, ..., 100b, 2b4t")
    command.add_argument("--recipe", metavar="NAME", help="precision of its layers (default bitnet_b158)")
    command.add_argument(
        "--head",
        metavar="NAME",
        help="format of the output head: float, int8 or int4; or a recipe, for an untied head",
    )
    ternary_format_argument(command)
    kv_format_argument(command)
    huge_pages_argument(command)
    command.add_argument(
        "--model",
        metavar="MODEL",
        help="the model to time: a folder of any format, a .gguf file or pypi:PACKAGE, packed into a temporary folder "
        "if it is not; a folder that does not exist is created",
    )
    command.add_argument(
        "--serve",
        metavar="MODEL",
        help="time a server of this model instead: throughput, times to the first token and between tokens",
    )
    command.add_argument(
        "--keep", action="store_true", help="do not remove the temporary folder of the weights"
    )
    command.add_argument(
        "--prompt", type=int, default=512, metavar="N", help="prompt tokens (default %(default)s)"
    )
    command.add_argument(
        "--generate", type=int, default=64, metavar="N", help="tokens to generate (default %(default)s)"
    )
    command.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="time everything N times (default %(default)s)"
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="only prefill and decoding: not on one thread, in batches, with other KV formats, from a process's start",
    )
    command.add_argument(
        "--compare",
        metavar="PEER",
        help="also time llama.cpp, interleaved, on random weights of the same shape: `llama.cpp` uses the package "
        "llama-cpp-python; any other value is the path of a llama-bench",
    )


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.tools import model_bench, peer_bench, serve_bench

    if args.serve is not None:
        others = (
            "preset",
            "recipe",
            "head",
            "ternary_format",
            "model",
            "keep",
            "quick",
            "huge_pages",
            "compare",
        )
        if given := [name for name in others if getattr(args, name)]:
            flag = given[0].replace("_", "-")
            raise ValueError(
                f"got --serve with --{flag}, expected --prompt, --generate, --repeats, --kv-format only"
            )
        served = serve_bench.bench_serving(
            args.serve,
            prompt=args.prompt,
            new_tokens=args.generate,
            repeats=args.repeats,
            kv_format=args.kv_format,
        )
        write_json(args.json, served)
        print(serve_bench.table(served))
        return 0
    if args.compare is not None and args.huge_pages:
        raise ValueError(
            "got --compare with --huge-pages, expected one of them: llama.cpp would have ordinary pages"
        )
    config = None
    if args.preset is not None:
        config = model_bench.preset_config(args.preset, args.recipe, args.head, args.ternary_format)
    with model_bench.model_folder(config, args.model, keep=args.keep) as folder:
        figures = model_bench.bench_model(
            folder,
            prompt=args.prompt,
            new_tokens=args.generate,
            repeats=args.repeats,
            kv_format=args.kv_format,
            quick=args.quick,
            huge_pages=args.huge_pages,
        )
        if args.compare is not None:
            figures["compare"] = peer_bench.compare(
                folder,
                args.compare,
                prompt=args.prompt,
                new_tokens=args.generate,
                rounds=args.repeats,
                kv_format=args.kv_format,
            )
    write_json(args.json, figures)
    print(model_bench.table(figures))
    if args.compare is not None:
        print(peer_bench.table(figures["compare"]))
    return 0
