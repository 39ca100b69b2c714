"""The complete workflow in one command: train, pack, prove equal, generate, report.

    make quickstart        or        python -m experiments.quickstart --workdir runs/quickstart

Trains a small language model on the text of Python's standard library three times (float, ternary and binary weights),
packs the weights to bits, proves that the packed model is equal, generates text with the packed kernels, and times
decoding of a 125M model. It can be interrupted at any time: the next call resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_experiments.configs import quickstart as quickstart_config
from bitnet_experiments.provenance import provenance
from bitnet_jax.data import Corpus, Tokenizer, load_corpus, read_documents, split_documents
from bitnet_jax.data.bpe import train_bpe
from bitnet_jax.evaluation.language import evaluate_text
from bitnet_jax.evaluation.ngram import ngram_bits_per_byte
from bitnet_jax.inference.generation import generate
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig
from bitnet_jax.packed import storage
from bitnet_jax.tools.machine import chosen
from bitnet_jax.tools.model_bench import bench_model, model_folder, preset_config
from bitnet_jax.tools.pack_model import pack_model
from bitnet_jax.training.load import load_run
from bitnet_jax.training.loop import fit
from bitnet_jax.training.metrics import read_metrics
from bitnet_jax.training.run_folder import write_atomic
from experiments import quickstart_report

RECIPES = {"float32": "float32", "ternary": "bitnet_b158", "binary": "bitnet"}
PROMPT = "    def __init__(self, "
SAMPLING = SamplingConfig(temperature=0.6, top_p=0.95)
PROOF_TOKENS = 2048
TEXT, TOKENIZER = "text.jsonl", "tokenizer.json"
EVERY = 3  # use every third document of the standard library
# The model whose speed is measured, with random weights; the trained ones are too small.
PRESETS = {"base": "125m", "short": "tiny"}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sample(config: ModelConfig, variables: Any, tokenizer: Tokenizer) -> str:
    """The prompt and its continuation, in total as long as a training sequence."""
    prompt = tokenizer.encode(PROMPT)
    new_tokens = config.known_length - len(prompt)
    text = generate(
        config, variables, prompt[None], max_new_tokens=new_tokens, sampling=SAMPLING, key=jax.random.key(0)
    )
    return PROMPT + tokenizer.decode(np.asarray(text.tokens[0, : int(text.lengths[0])]))


def prepare(config: Any, workdir: Path) -> None:
    """Writes the text and a tokenizer trained on its training split into `workdir`, unless they exist."""
    text, tokenizer = workdir / TEXT, workdir / TOKENIZER
    workdir.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        # A part of the library is already more than the models see in their short training.
        documents = read_documents("stdlib").documents[::EVERY]
        records = [json.dumps({"title": document.name, "text": document.text}) for document in documents]
        write_atomic(text, "\n".join(records) + "\n")
    if not tokenizer.exists():
        say(f"learning {config.model.vocab_size} tokens from the text")
        documents = read_documents(str(text)).documents
        train, _ = split_documents(documents, config.data.split, config.data.valid_fraction)
        write_atomic(tokenizer, train_bpe(train, config.model.vocab_size).to_json())


def held_out_score(config: Any, model: ModelConfig, variables: Any, corpus: Corpus) -> float:
    """Bits per byte over the windows that training evaluates, so that the curves and the table agree."""
    held_out = config.evaluation.batches * config.evaluation.batch_size * config.data.length
    return evaluate_text(
        model, variables, corpus.valid, corpus.valid_token_bytes, max_tokens=held_out
    ).bits_per_byte


def trigram_bits_per_byte(config: Any, corpus: Corpus) -> float:
    """Bits per byte of a byte trigram model of the training text, on the text the models are evaluated on."""
    held_out = config.evaluation.batches * config.evaluation.batch_size * config.data.length
    data = config.data
    text = load_corpus(data.source, split=data.split, valid_fraction=data.valid_fraction)
    # Both streams contain the same documents with different tokens: cut at the same position of the text.
    text_bytes = int(corpus.valid_token_bytes[: held_out + 1].sum())
    end = int(np.searchsorted(np.cumsum(text.valid_token_bytes), text_bytes)) + 1
    return ngram_bits_per_byte(text.train, text.valid[:end], int(text.valid_token_bytes[2:end].sum()))


def run_precision(name: str, variant: str, workdir: Path, corpus: Corpus) -> dict[str, Any]:
    """Trains one precision (unless done already), packs it, proves it, measures it. Returns its row of the report."""
    config = quickstart_config.get_config(variant, RECIPES[name], workdir / TEXT, workdir / TOKENIZER)
    result = fit(config, workdir / name / "run")
    if result["status"] != "finished":
        raise RuntimeError(f"{name}: training stopped, {result['message']}")

    folder = workdir / name / "packed"
    say(f"{name}: packing, and comparing {PROOF_TOKENS} greedy tokens of the packed and the latent model")
    proof, sizes = pack_model(workdir / name / "run", folder, tokens=PROOF_TOKENS, overwrite=True)
    _, model, _, tokenizer = load_run(workdir / name / "run")
    packed = storage.load_packed(folder).variables
    bits_per_byte = held_out_score(config, model, packed, corpus)
    choices = chosen(model, packed)  # none for the float model: it has no packed matrix
    say(f"{name}: {bits_per_byte:.3f} bits per held-out byte; measuring speed")
    with model_folder(preset_config(PRESETS[variant], RECIPES[name]), None) as large:
        speed = bench_model(large, prompt=16, new_tokens=33, repeats=3)
    return {
        "recipe": RECIPES[name],
        "bits_per_byte": bits_per_byte,
        "parameters": result["parameters"],
        "training_seconds": result["seconds"],
        "training_tokens": result["tokens"],
        "proof": dataclasses.asdict(proof),
        "sizes": dataclasses.asdict(sizes),
        "file_bytes": (folder / storage.MODEL).stat().st_size,
        "matrix_bfloat16_bytes": 2 * sum(n * k for n, k in model.linear_shapes().values()),
        "preset_tokens_per_second": speed["decode_tokens_per_second"],
        "preset_bytes": speed["model_bytes"],
        "implementation": choices[0].name if choices else "xla",
        "isa": choices[0].isa if choices else None,
        "sample": sample(model, packed, tokenizer),
        "curve": [
            {"step": m["step"], "bits_per_byte": m["bits_per_byte"]}
            for m in read_metrics(workdir / name / "run" / "metrics.jsonl")
            if m["kind"] == "valid"
        ],
    }


def summarize(rows: dict[str, dict[str, Any]], variant: str, trigram: float, began: float) -> dict[str, Any]:
    """The machine-readable summary; the report is made from the same figures."""
    return {
        "bits_per_byte": {name: row["bits_per_byte"] for name, row in rows.items()},
        "trigram_bits_per_byte": trigram,
        "model_bytes": {name: row["file_bytes"] for name, row in rows.items()},
        "matrix_bfloat16_bytes": {name: row["matrix_bfloat16_bytes"] for name, row in rows.items()},
        "packed_equals_latent": all(
            row["proof"]["tokens_identical"] >= PROOF_TOKENS for row in rows.values()
        ),
        "tokens_identical": min(row["proof"]["tokens_identical"] for row in rows.values()),
        "max_relative_logit_error": {
            name: row["proof"]["max_relative_logit_error"] for name, row in rows.items()
        },
        "preset": PRESETS[variant],
        "decode_tokens_per_second": {name: row["preset_tokens_per_second"] for name, row in rows.items()},
        "preset_bytes": {name: row["preset_bytes"] for name, row in rows.items()},
        "implementation": rows["binary"]["implementation"],
        "isa": rows["binary"]["isa"],
        **provenance(),
        "seconds": round(time.monotonic() - began, 1),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument(
        "--short",
        action="store_true",
        help="much shorter training and a tiny model for the speed, for automatic checks",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the contents of the folder first")
    args = parser.parse_args(argv)
    began, variant = time.monotonic(), "short" if args.short else "base"
    workdir = args.workdir / "short" if args.short else args.workdir
    if args.fresh:
        shutil.rmtree(workdir, ignore_errors=True)

    config = quickstart_config.get_config(variant, source=workdir / TEXT, tokenizer=workdir / TOKENIZER)
    prepare(config, workdir)
    data = config.data
    corpus = load_corpus(
        data.source, tokenizer=data.tokenizer, split=data.split, valid_fraction=data.valid_fraction
    )
    say(
        f"text: {corpus.train_bytes:,} bytes of the standard library for training, {corpus.valid_bytes:,} held out"
    )
    trigram = trigram_bits_per_byte(config, corpus)
    rows = {}
    for name in RECIPES:
        say(f"\n{name}: training")
        rows[name] = run_precision(name, variant, workdir, corpus)
    summary = summarize(rows, variant, trigram, began)
    quickstart_report.write(args.workdir, summary, rows)
    print((args.workdir / "report.md").read_text())


if __name__ == "__main__":
    main()
