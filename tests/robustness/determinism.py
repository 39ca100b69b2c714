"""Tokens and logits of packed models across instruction sets, cores, threads, batches, with and without jit.

    python -m tests.robustness.determinism --json outcomes.json

A tiny model with random weights per packed format. One process per instruction set and number of cores computes, for
1, 2 and 3 kernel threads, the results of four prompts together and each alone. Guaranteed: the same tokens
everywhere, and bit-identical logits for any instruction set, cores and threads. What may differ by
rounding (a row alone and in a batch, jit and no jit: XLA orders sums by shape and fusion) is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_jax.inference.cache import init_cache
from bitnet_jax.inference.generation import generate
from bitnet_jax.model_folders import load_text_model
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing
from bitnet_jax.tools.random_model import write_random
from bitnet_kernels import cpu
from tests.robustness.commands import end, environment, start

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, ffn_size=96, max_length=32,
    norm_placement="sub", mlp="relu2_glu", embedding_dtype="bfloat16",
)  # fmt: skip
MODELS = {
    "binary": dataclasses.replace(CONFIG, precision="bitnet"),
    "ternary2": dataclasses.replace(CONFIG, precision="bitnet_b158"),
    "ternary5": dataclasses.replace(CONFIG, precision="bitnet_b158", ternary_format="ternary5"),
    "int4": dataclasses.replace(CONFIG, precision="int4"),
    "int8": dataclasses.replace(CONFIG, precision="int8"),
    "ternary2, head int4": dataclasses.replace(CONFIG, precision="bitnet_b158", head="int4"),
}
WITHOUT_JIT = ("ternary2",)
PROMPTS, LENGTH, TOKENS = 4, 8, 16
THREADS = (1, 2, 3)
PROGRAM = "import sys; from tests.robustness.determinism import child; child(*sys.argv[1:])"


def write_models(place: Path) -> None:
    for name, config in MODELS.items():
        formats = {
            packed.format for packed in jax.tree.leaves(packing.abstract(config)["packed"], is_leaf=_packed)
        }
        assert name.partition(",")[0] in formats, (name, formats)
        write_random(place / "models" / name, config, seed=1, progress=False)


def _packed(leaf: Any) -> bool:
    return hasattr(leaf, "format")


def child(place: str, target: str, *without_jit: str) -> None:
    """All arrays that this process computes, keyed by model, threads and kind, as one .npz.

    Args:
      without_jit: the models to also compute without jit: every operation is compiled separately.
    """
    prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (PROMPTS, LENGTH), dtype=np.int32)
    arrays: dict[str, np.ndarray] = {}
    for name in MODELS:
        model = load_text_model(Path(place) / "models" / name)
        config, variables = model.config, model.variables

        def logits(tokens: np.ndarray, config: Any = config, variables: Any = variables) -> jax.Array:
            cache = init_cache(config, len(tokens), LENGTH, None)
            output: Any = Transformer(config).apply(variables, tokens, cache=cache)
            return output.logits

        jitted = jax.jit(logits)
        for threads in THREADS:
            cpu.set_thread_count(threads)
            for rows in (prompts, *prompts[:, None]):
                which = "batch" if len(rows) > 1 else f"alone{int((prompts == rows).all(1).argmax())}"
                key = f"{name}|{threads}|{which}"
                arrays[f"{key}|tokens"] = np.asarray(
                    generate(config, variables, rows, max_new_tokens=TOKENS).tokens
                )
                arrays[f"{key}|logits"] = np.asarray(jitted(rows))
        if name in without_jit:
            with jax.disable_jit():
                arrays[f"{name}|{THREADS[-1]}|batch|no jit"] = np.asarray(logits(prompts))
    np.savez(target, **arrays)


def settings(isas: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Name -> (instruction set, cores for taskset or None: all); the others are compared with the first one."""
    found: dict[str, tuple[str, str | None]] = {isa: (isa, None) for isa in reversed(isas)}
    first = min(os.sched_getaffinity(0))
    return found | {f"{isas[-1]} on one core": (isas[-1], str(first))}


def compute(place: Path, isas: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    write_models(place)
    results = {}
    for number, (name, (isa, cores)) in enumerate(settings(isas).items()):
        target = place / f"{number}.npz"
        env = environment(place) | {"BITNET_KERNELS_ISA": isa}
        before = [] if cores is None else ["taskset", "-c", cores]
        without_jit = WITHOUT_JIT if number == 0 else ()
        arguments = [str(place), str(target), *without_jit]
        code, _, error = end(start(arguments, env, program=PROGRAM, before=before))
        assert code == 0, error[-1000:]
        with np.load(target) as arrays:
            results[name] = dict(arrays)
    return results


def compare(results: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Comparisons, violations of the guarantees, and the largest differences where rounding is allowed."""
    base = results[next(iter(results))]
    counts = {"tokens": 0, "logits over instruction sets, cores and threads": 0}
    faults: list[str] = []
    unequal, largest = {"row alone": 0, "no jit": 0}, {"row alone": 0.0, "no jit": 0.0}

    def differ(kind: str, got: np.ndarray, expected: np.ndarray) -> None:
        unequal[kind] += not np.array_equal(got, expected)
        relative = float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))
        largest[kind] = max(largest[kind], relative)

    for setting, arrays in results.items():
        for key, got in arrays.items():
            model, _, which, what = key.split("|")
            batch = base[f"{model}|{THREADS[0]}|batch|{'tokens' if what == 'tokens' else 'logits'}"]
            row = batch if which == "batch" else batch[int(which.removeprefix("alone"))][None]
            if what == "tokens":
                counts["tokens"] += 1
                if not np.array_equal(got, row):
                    faults.append(f"{setting}: tokens of {key} differ")
                continue
            if what == "no jit":
                differ("no jit", got, row)
                continue
            if which != "batch":
                differ("row alone", got, row)
            counts["logits over instruction sets, cores and threads"] += 1
            if not np.array_equal(got, base[f"{model}|{THREADS[0]}|{which}|{what}"]):
                faults.append(f"{setting}: logits of {key} have other bits")
    return {
        "settings": list(results),
        "threads": list(THREADS),
        "models": list(MODELS),
        "compared": counts,
        "logits that differ in rounding": unequal,
        "largest difference, of the largest logit": largest,
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the comparison to this file")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        found = compare(compute(Path(place), cpu.available_isas()))
    found["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(found, indent=2)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
