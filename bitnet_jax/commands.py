"""What the sub-commands of `bitnet-jax` do. cli.py has their words: arguments, help, errors and exit codes.

Each function takes the parsed arguments and returns the exit code. Its docstring is the command's --help, its
imports are inside, so that --help is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        from bitnet_jax.training.metrics import finite_json

        path.write_text(json.dumps(finite_json(figures), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def train(args: argparse.Namespace) -> int:
    """Train a model from a config file, or go on with the run that the folder holds.

    example:
      bitnet-jax train --config experiments/configs/byte_lm.py:small --workdir runs/first \\
          --config.training.steps=200 --config.model.precision=bitnet
    """
    from bitnet_jax.config_file import load_config_file
    from bitnet_jax.training.loop import fit

    config = load_config_file(args.config, args.overrides)
    result = fit(config.to_dict(), args.workdir, progress=not args.quiet)
    _write_json(args.json, result)
    print(json.dumps(result, indent=2))
    return 0 if result["status"] == "finished" else 1


def pack(args: argparse.Namespace) -> int:
    """Pack a run's weights to bits, after proving that the packed model is the same model.

    Nothing is written if a code, a greedy token, or a logit beyond 1e-5 of the largest differs.

    example:
      bitnet-jax pack runs/first runs/first-packed
      bitnet-jax pack runs/first runs/first-int8 --head int8
    """
    from bitnet_jax.model_folders import pack_run

    proof, sizes = pack_run(
        args.run_folder,
        args.folder,
        step=args.step,
        tokens=args.tokens,
        head=args.head,
        ternary_format=args.ternary_format,
        overwrite=args.overwrite,
    )
    if not proof.matrices:
        print("warning: no matrix of this model has a packed form; it is stored as it is", file=sys.stderr)
    figures = {"proof": dataclasses.asdict(proof), "bytes": _size_figures(sizes), "folder": str(args.folder)}
    _write_json(args.json, figures)
    print(
        f"packed equals latent: {proof.matrices} matrices, {proof.logits} logits within "
        f"{proof.max_relative_logit_error:.1e} of the largest, {proof.tokens_identical} greedy tokens\n"
        f"{args.folder}: {_describe_sizes(sizes)}"
    )
    return 0


def generate(args: argparse.Namespace) -> int:
    """Continue a prompt, printing the text as it comes.

    The prompt comes from --prompt, --file or standard input. With the same --seed the same text comes out.

    example:
      bitnet-jax generate runs/first-packed --prompt "def " --temperature 0.8 --top-p 0.95 --seed 1
    """
    import jax

    from bitnet_jax.doctor import chosen
    from bitnet_jax.inference.exact_head import with_exact_head
    from bitnet_jax.inference.sampling import SamplingConfig
    from bitnet_jax.inference.streaming import stream
    from bitnet_jax.model_folders import load_model

    sampling = SamplingConfig(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    prompt = _prompt(args)
    model = load_model(args.folder, step=args.step)
    if model.tokenizer is None:
        raise ValueError(
            f"got {args.folder} without tokenizer.json, expected one that turns text into tokens; add it"
        )
    variables = with_exact_head(model.config, model.variables) if args.exact_head else model.variables
    room = model.config.max_length - len(model.tokenizer.encode(prompt))
    began = time.perf_counter()
    came: list[tuple[float, int]] = []  # (seconds, tokens) of each chunk
    pieces = stream(
        model.config,
        variables,
        model.tokenizer,
        prompt,
        max_new_tokens=max(1, min(200, room)) if args.tokens is None else args.tokens,
        sampling=sampling,
        key=jax.random.key(args.seed),
        stop=args.stop,
        kv_format=args.kv_format,
        on_tokens=lambda count: came.append((time.perf_counter() - began, count)),
    )
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    figures = {
        "prompt": prompt,
        "text": text,
        "tokens": sum(count for _, count in came),
        "seconds": came[-1][0],
        "tokens_per_second": _settled_speed(came),
        "ran_on": [choice._asdict() for choice in chosen(model.config, model.variables)],
    }
    _write_json(args.json, figures)
    print(_describe_generation(figures), file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.file is not None:
        return args.file.read_text(encoding="utf-8")
    if sys.stdin.isatty():
        raise ValueError("got no prompt; expected --prompt TEXT, --file FILE, or text on standard input")
    return sys.stdin.read()


def _settled_speed(came: Sequence[tuple[float, int]]) -> float | None:
    """Tokens per second after the first two chunks, which waited for the compiler (prompt, then loop)."""
    if len(came) < 3:
        return None
    return sum(count for _, count in came[2:]) / (came[-1][0] - came[1][0])


def _describe_generation(figures: dict[str, Any]) -> str:
    speed = figures["tokens_per_second"]
    ran_on = [f"{choice['name']} ({choice['isa']})" for choice in figures["ran_on"] if choice["isa"]]
    ran_on += [f"{choice['name']}: {choice['reason']}" for choice in figures["ran_on"] if not choice["isa"]]
    return (
        f"[{figures['tokens']} tokens in {figures['seconds']:.2f} s with compilation, "
        f"{'too few to time' if speed is None else f'{speed:.1f} tokens/s after it'}; "
        f"{'packed weights on ' + ', '.join(ran_on) if ran_on else 'latent weights on XLA'}]"
    )


def evaluate(args: argparse.Namespace) -> int:
    """Measure bits per byte and perplexity on held-out text, or what a model scores in named tasks.

    The task `language`, which is the default, measures held-out text: without --source that of a run's own data,
    for other folders of the standard library. The others read files below $BITNET_JAX_DATA or --data-root:

      choices           arc_challenge arc_easy hellaswag openbookqa piqa social_iqa winogrande
      language          blimp (minimal pairs), lambada (last words)
      classes           sst2 trec banking77 cola sms_spam
      summaries         scitldr (needs pip install 'bitnet-jax[summarization]')

    A classifier (num_classes) can do those of classes. Each figure has a 95 % interval over its examples.
    --harness runs tasks of lm-evaluation-harness instead, with its data (pip install 'bitnet-jax[harness]').

    example:
      bitnet-jax eval runs/first-packed --source texts/ --split all --json figures.json
      bitnet-jax eval runs/first-packed --tasks blimp,lambada,arc_easy --limit 500 --json tasks.json
    """
    from bitnet_jax.evaluation.likelihood import TextModel
    from bitnet_jax.evaluation.tasks import TASKS, describe, run_task
    from bitnet_jax.model_folders import load_model

    names = [name.strip() for name in args.tasks.split(",")]
    if unknown := [name for name in names if name not in ("language", *TASKS)]:
        raise ValueError(f"got --tasks {', '.join(unknown)}, expected some of language, {', '.join(TASKS)}")
    model = load_model(args.folder, step=args.step)
    if model.tokenizer is None:
        raise ValueError(
            f"got {args.folder} without tokenizer.json, expected one that turns text into tokens; add it"
        )
    text_model = TextModel(model.config, model.variables, model.tokenizer)
    how = {"limit": args.limit, "progress": not args.quiet}
    if args.harness:
        from bitnet_jax.harness import run_harness

        results = run_harness(text_model, args.harness.split(","), include_path=args.include_path, **how)
        _write_json(args.json, results)
        print(json.dumps(results, indent=2, default=str))
        return 0
    figures: dict[str, Any] = {}
    for name in names:
        if name == "language":
            figures[name] = _language_figures(args, model)
            print(_describe_language(figures[name]))
        else:
            figures[name] = run_task(text_model, name, root=args.data_root, **how)
            print("\n".join(describe(name, figures[name])))
        # After each task: the next one may take hours.
        _write_json(args.json, figures["language"] if names == ["language"] else figures)
    return 0


def _language_figures(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    from bitnet_jax.data import load_corpus, read_documents, token_stream
    from bitnet_jax.evaluation.language import evaluate_text
    from bitnet_jax.training.config import DataConfig
    from bitnet_jax.training.run_folder import RunFolder

    own = RunFolder(args.folder).read_config().data if model.kind == "run" else DataConfig()
    data = own if args.source is None else DataConfig(source=args.source)
    split = args.split or data.split
    if split == "all":
        tokens = token_stream(read_documents(data.source, data.root).documents, model.tokenizer)
    else:
        tokens = load_corpus(
            data.source,
            tokenizer=model.tokenizer,
            split=split,
            valid_fraction=args.valid_fraction or data.valid_fraction,
            valid_source=data.valid_source,
            root=data.root,
        ).valid
    began = time.perf_counter()
    score = evaluate_text(
        model.config, model.variables, tokens, model.tokenizer, length=args.length, max_tokens=args.max_tokens
    )
    return score.summary() | {
        "source": data.source,
        "split": split,
        "seconds": time.perf_counter() - began,
    }


def _describe_language(figures: dict[str, Any]) -> str:
    return (
        f"{figures['bits_per_byte']:.4f} bits per byte, perplexity {figures['perplexity']:.3f} per token "
        f"({figures['tokens']} tokens, {figures['text_bytes']} bytes of {figures['source']}, {figures['split']})"
    )


def info(args: argparse.Namespace) -> int:
    """Show what a folder holds: config, recipe of each layer, size of each part, packed formats.

    Contents of a large packed model are read and compared with their checksums only with --verify.

    example:
      bitnet-jax info runs/first-packed --verify
    """
    from bitnet_jax import packing
    from bitnet_jax.model_folders import load_model, matrices

    model = load_model(args.folder, step=args.step, verify=args.verify or None)
    sizes = packing.sizes(model.variables)
    layers = matrices(model.config, model.variables)
    config = model.config.to_dict()
    figures = {
        "kind": model.kind,
        "config": config,
        "tokenizer": None if model.tokenizer is None else model.tokenizer.kind,
        "matrices": layers,
        "bytes": _size_figures(sizes),
    }
    _write_json(args.json, figures)
    print(f"{args.folder}: {model.kind}, tokenizer {figures['tokenizer']}, {_describe_sizes(sizes)}\n")
    for name, value in config.items():
        print(f"  {name:18s} {value}")
    print(f"\n  {'matrix':34s} {'n x k':>13s}  {'recipe':22s} {'stored':18s} {'bytes':>11s}")
    for path, row in layers.items():
        shape = "{} x {}".format(*row["shape"])
        print(f"  {path:34s} {shape:>13s}  {row['recipe']:22s} {row['stored']:18s} {row['bytes']:11,d}")
    return 0


def _size_figures(sizes: Any) -> dict[str, int]:
    return dataclasses.asdict(sizes) | {"total": sizes.total}


def _describe_sizes(sizes: Any) -> str:
    packed = f"{sizes.packed:,d} packed ({sizes.packed_ratio:.3f} of bfloat16), " if sizes.packed else ""
    return f"{sizes.total:,d} bytes: {packed}{sizes.embeddings:,d} embeddings, {sizes.other:,d} other"


def bench(args: argparse.Namespace) -> int:
    """Time a model of a known shape with random weights: prefill, decoding, memory, against the machine's limits.

    The weights are written to a temporary folder, or to --model, and read back; a --model that exists is timed as
    it is. Ratios (of the read ceiling, of the multiplier peak, kernels to whole step) come from measurements in
    turn; figures in tokens per second move with what else the machine does.

    example:
      bitnet-jax bench --preset 2b4t --recipe bitnet_b158 --prompt 512 --generate 64 --threads 2 --json bench.json
    """
    if args.threads is not None:
        _use_threads(args.threads)  # before JAX starts its own
    from bitnet_jax import model_bench

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
        )
    _write_json(args.json, figures)
    print(model_bench.table(figures))
    return 0


def energy(args: argparse.Namespace) -> int:
    """Count operations, joules and bytes of a model by arithmetic; with --measure, joules by the machine's meters.

    The energy model is BitNet's (2310.11453): every token attends to all others of the text, the output head is
    told apart. --measure generates text and reads RAPL (processors) and NVML (GPUs, pip install
    'bitnet-jax[energy]') meanwhile.

    example:
      bitnet-jax energy --preset 2b4t --length 512 --json energy.json
      bitnet-jax energy runs/first-packed --measure
    """
    from bitnet_jax import energy_report
    from bitnet_jax.model_folders import load_model

    variables = None
    if args.folder is not None:
        if args.preset or args.config or args.recipe or args.head or args.ternary_format:
            raise ValueError(
                "got FOLDER beside --preset, --config or what changes them, expected one of these"
            )
        _, config, variables, _ = load_model(args.folder, step=args.step)
    else:
        shape = args.recipe, args.head, args.ternary_format
        config = energy_report.chosen_config(args.preset, args.config, *shape)
    figures = energy_report.energy_figures(
        config,
        length=args.length,
        floats=args.floats,
        kv_format=args.kv_format,
        zeros=_zero_shares(args.zeros),
    )
    if args.measure:
        figures["measured"] = energy_report.measured_figures(config, variables)
    _write_json(args.json, figures)
    print(energy_report.table(figures))
    return 0


def _zero_shares(words: Sequence[str]) -> dict[str, float]:
    shares = {}
    for word in words:
        pattern, _, share = word.partition("=")
        try:
            shares[pattern] = float(share)
        except ValueError as error:
            raise ValueError(
                f"got --zeros {word}, expected PATTERN=SHARE, such as '*down_proj=0.8'"
            ) from error
    return shares


def _use_threads(count: int) -> None:
    """Restricts the process to the first `count` processors that it may use."""
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"got --threads {count}, expected none: this system cannot restrict a process")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise ValueError(f"got --threads {count}, expected 1 to {len(allowed)}, the processors there are")
    os.sched_setaffinity(0, allowed[:count])


def doctor(args: argparse.Namespace) -> int:
    """Check every kernel on this machine against NumPy, and a tiny packed model against the latent one.

    Exit code 0: all that is present is right; 1: something is wrong.

    example:
      bitnet-jax doctor                     BITNET_KERNELS_ISA=avx2 bitnet-jax doctor
    """
    from bitnet_jax import doctor as checks

    machine, choice = checks.machine(), checks.choice_here()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    found = checks.diagnose()
    words = {True: "ok", False: "WRONG", None: "absent"}
    for check in found:
        print(f"{words[check.passed]:7s} {check.name:32s} {check.detail}")
    healthy = checks.healthy(found)
    print(f"packed_matmul runs on {choice.name}: {choice.reason}")
    print(
        "healthy"
        if healthy
        else "error: something above is WRONG; do not trust packed models on this machine"
    )
    figures = {"machine": machine, "choice": choice._asdict(), "healthy": healthy}
    _write_json(args.json, figures | {"checks": [dataclasses.asdict(check) for check in found]})
    return 0 if healthy else 1
