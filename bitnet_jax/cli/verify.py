"""Verify a model: the packed path against float arithmetic, or against another model or stored logits.

Without --against, the packed weights are unpacked to floats and run layer by layer through plain JAX: the largest
difference of each block is shown. With it, the other model (any folder or .gguf file) is the reference, or a .npz file
with `input_ids` [B, T] and `logits` [B, S, V] at the last S positions, such as another program wrote.

Both read the same text (--source, a sample of Python's standard library by default; random tokens for a model without
a tokenizer).

The models agree if the mean KL divergence is at most --max-kl nats a token and, if --max-logit-error is given, no logit
differs by more. Exit code: 0 if they agree, 1 if not, 2 for invalid input.

example:
  bitnet-jax verify smollm2-packed --against smollm2 --json verify.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import write_json

LENGTH = 128  # that of tools/text_rows.py, whose imports would slow --help


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, or pypi:PACKAGE")
    command.add_argument(
        "--against", metavar="OTHER", help="the reference: a model, or a .npz file of logits"
    )
    command.add_argument("--source", help="text to compare on: a file or a folder (default: stdlib)")
    command.add_argument("--rows", type=int, default=4, help="rows of text (default %(default)s)")
    command.add_argument(
        "--length", type=int, help=f"tokens in each row (default {LENGTH}, or the positions of the models)"
    )
    command.add_argument(
        "--max-kl",
        type=float,
        default=1e-4,
        metavar="NATS",
        help="mean KL divergence a token with which the models agree (default %(default)s)",
    )
    command.add_argument(
        "--max-logit-error",
        type=float,
        metavar="X",
        help="largest difference of a logit with which they agree (default: any)",
    )
    command.add_argument(
        "--new-tokens",
        type=int,
        default=16,
        help="greedy tokens after each row's first half (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.model_folders import load_text_model
    from bitnet_jax.packed.latent import unpack_model
    from bitnet_jax.tools import agreement
    from bitnet_jax.tools.text_rows import text_rows

    for name, least in {"rows": 1, "length": 1, "new_tokens": 0, "max_kl": 0, "max_logit_error": 0}.items():
        if (value := getattr(args, name)) is not None and not value >= least:  # NaN is not
            raise ValueError(f"got --{name.replace('_', '-')} {value}, expected at least {least}")
    model = load_text_model(args.model)
    if args.against is not None and args.against.endswith(".npz"):
        rows = agreement.read_logits(Path(args.against))
        figures: dict[str, Any] = dataclasses.asdict(agreement.compare(rows, model))
    else:
        if args.against is not None:
            reference = load_text_model(args.against)
            _check_same_text(model, reference)
        elif "packed" in model.variables:
            reference = model._replace(variables=unpack_model(model.config, model.variables))
        else:
            raise ValueError(f"got {args.model} without packed weights, expected --against another model")
        longest = min(model.config.max_length, reference.config.max_length)
        if args.length is not None and args.length > longest:
            shorter = args.model if model.config.max_length == longest else args.against
            raise ValueError(
                f"got --length {args.length}, expected at most {longest}, the positions of {shorter}"
            )
        tokens = text_rows(model, args.source, args.rows, args.length or min(LENGTH, longest))
        figures = dataclasses.asdict(agreement.compare(agreement.logits_of(reference, tokens), model))
        figures["layers"] = agreement.compare_layers(reference, model, tokens[0])
        room = longest - tokens.shape[1] // 2
        if (count := min(args.new_tokens, room)) and tokens.shape[1] > 1:
            prompts = tokens[:, : tokens.shape[1] // 2]
            greedy = agreement.compare_greedy(reference, model, prompts, count)
            figures |= {
                "greedy_equal": greedy.equal,
                "greedy_tokens": greedy.tokens,
                "first_difference": greedy.first_difference,
            }
    figures |= {"model": args.model, "against": args.against or "the same weights in floats"}
    limits = {"kl": args.max_kl, "max_logit_error": args.max_logit_error}
    beyond = [name for name, most in limits.items() if most is not None and not figures[name] <= most]
    figures |= {"limits": limits, "agree": not beyond}
    write_json(args.json, figures)
    print(_describe(figures))
    for name in beyond:
        print(f"do not agree: {_LIMITED[name]} {figures[name]:.3g}, expected at most {limits[name]:.3g}")
    if not beyond:
        print("agree")
    return 1 if beyond else 0


_LIMITED = {"kl": "KL divergence", "max_logit_error": "largest difference of a logit"}


def _check_same_text(model: Any, other: Any) -> None:
    if model.config.vocab_size != other.config.vocab_size:
        raise ValueError(
            f"got models of {model.config.vocab_size} and {other.config.vocab_size} tokens, expected one vocabulary"
        )
    known = model.tokenizer is not None and other.tokenizer is not None
    if known and _vocabulary(model.tokenizer) != _vocabulary(other.tokenizer):
        raise ValueError("got models with different tokenizers, expected one: their ids mean different text")


def _vocabulary(tokenizer: Any) -> Any:
    """The token of each id; converted tokenizers have the same one, in files that differ."""
    content = json.loads(tokenizer.to_json())
    if tokenizer.kind != "json":
        return content
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return {**content["model"]["vocab"], **added} if isinstance(content["model"]["vocab"], dict) else content


def _describe(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['model']} against {figures['against']}, {figures['positions']} positions",
        f"  logits           differ by at most {figures['max_logit_error']:.3g}, "
        f"on average {figures['mean_logit_error']:.3g}",
        f"  KL divergence    {figures['kl']:.3g} nats a token, at most {figures['max_kl']:.3g}",
        f"  most likely token the same at {100 * figures['top1']:.2f} % of the positions",
    ]
    if figures["nats_per_token"] is not None:
        lines.append(
            f"  nats per token   {figures['nats_per_token']:.4f}, "
            f"the reference {figures['reference_nats_per_token']:.4f}"
        )
    if "greedy_equal" in figures:
        equal = "all equal"
        if not figures["greedy_equal"]:
            prompt, index = figures["first_difference"]
            equal = f"first difference at new token {index} of row {prompt}"
        lines.append(f"  greedy           {figures['greedy_tokens']} tokens, {equal}")
    for name, error in figures.get("layers", {}).items():
        lines.append(f"  {name:16s} differs by {error:.2e} of its largest output")
    return "\n".join(lines)
