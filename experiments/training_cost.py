"""The cost of a training step: fake quantization against float, and int8 products against bfloat16.

    python -m experiments.training_cost --json cost.json                               # recipes, on any machine
    python -m experiments.training_cost --preset 700m --statistics-every 0 --json products.json         # on a GPU
    python -m experiments.training_cost --compare torch --sizes 1m,5m --json f.json    # training_side_by_side.py

One jitted update (loss, gradient, AdamW, statistics of the codes) on random tokens. Without --preset, recipes are
compared on the quickstart's byte-level model; with it, product types on a model of that size: float32, bfloat16, and
fake quantization with products in bfloat16, in int8, and in int8 with int8 gradients of the inputs. Every round times
one step of each variant, all sharing one training state, so that the ratios are measured under the same conditions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: `python experiments/training_cost.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from bitnet_experiments.provenance import provenance
from bitnet_jax.models import PRESETS, ModelConfig, Transformer
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.config_file import load_config_file
from bitnet_jax.training.optimizers import make_optimizer
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import init_variables, language_loss
from experiments.training_side_by_side import SIZES, side_by_side

CONFIG = "quickstart"
BYTES = 256  # vocabulary
# name -> fields of the model; the first is the baseline
RECIPES = {recipe: {"precision": recipe} for recipe in ("float32", "bitnet_b158", "bitnet")}
_TERNARY = {"precision": "bitnet_b158", "dtype": "bfloat16"}
PRODUCTS = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16", "dtype": "bfloat16"},
    "ternary, bfloat16": _TERNARY,
    "ternary, int8": _TERNARY | {"product": "int8"},
    "ternary, int8 gradients": _TERNARY | {"product": "int8_gradients"},
}


def quickstart() -> RunConfig:
    return RunConfig.from_dict(load_config_file(CONFIG))


def measure(
    model: ModelConfig,
    variants: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int,
    length: int,
    rounds: int,
    statistics_every: int = 1,
) -> dict[str, Any]:
    """Milliseconds per step, tokens per second and the cost relative to the first variant, as medians with p10 and
    p90; and the temporary memory of a compiled step in bytes, which includes saved activations."""
    optimizer = make_optimizer(quickstart().optimizer, total_steps=quickstart().training.steps)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch_size, length + 1)).astype(np.int32)
    arguments = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, jax.random.key(1)
    init = jax.jit(init_variables, static_argnums=0)
    state = TrainState.create(
        init(dataclasses.replace(model, precision="float32"), jax.random.key(0)), optimizer
    )
    steps = {}
    for name, fields in variants.items():
        config = dataclasses.replace(model, **fields)
        step = make_train_step(
            language_loss(Transformer(config)),
            optimizer,
            total_steps=quickstart().training.steps,
            precisions={path: p for path, p in config.precisions().items() if p.quantizes_weights},
            statistics_every=statistics_every,
        )
        steps[name] = jax.jit(step, donate_argnums=0).lower(state, *arguments).compile()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-2, rounds):  # the first two warm up
        for name, step in steps.items():
            began = time.perf_counter()
            state, metrics = step(state, *arguments)
            jax.block_until_ready((state, metrics))
            if number >= 0:
                times[name].append(time.perf_counter() - began)
    took = {name: np.array(seconds) for name, seconds in times.items()}
    baseline = next(iter(variants))
    return {
        "batch_size": batch_size,
        "length": length,
        "rounds": rounds,
        "statistics_every": statistics_every,
        "milliseconds": {name: _spread(1e3 * seconds) for name, seconds in took.items()},
        "tokens_per_second": {name: _spread(batch_size * length / seconds) for name, seconds in took.items()},
        f"cost_against_{baseline}": {
            name: _spread(seconds / took[baseline] - 1) for name, seconds in took.items()
        },
        "temporary_bytes": {name: _temporary_bytes(step) for name, step in steps.items()},
        "device": jax.devices()[0].device_kind,
        "provenance": provenance(),
    }


def _temporary_bytes(step: jax.stages.Compiled) -> int | None:
    memory = step.memory_analysis()  # None if the backend does not report it
    return None if memory is None else memory.temp_size_in_bytes


def _spread(values: np.ndarray) -> dict[str, float]:
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="compare product types on a model of this size")
    parser.add_argument("--batch-size", type=int, help="sequences per step (default 8; without --preset 16)")
    parser.add_argument("--length", type=int, help="tokens per sequence (default 512; without --preset 64)")
    parser.add_argument(
        "--rounds", type=int, default=40, help="timed steps per variant, or turns (default 40)"
    )
    parser.add_argument(
        "--statistics-every",
        type=int,
        default=1,
        help="steps between measurements of the codes, 0: never (default 1)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--compare",
        choices=("torch", "jax"),
        help="this package in turn with plain JAX, and with PyTorch",
    )
    parser.add_argument(
        "--sizes", default=",".join(SIZES), help=f"with --compare: comma-separated, of {', '.join(SIZES)}"
    )
    parser.add_argument(
        "--torch-python", default=sys.executable, help="with --compare: the Python that has torch (this one)"
    )
    options = parser.parse_args()
    if options.compare is not None:
        sizes = options.sizes.split(",")
        if unknown := [name for name in sizes if name not in SIZES]:
            parser.error(f"--sizes: got {', '.join(unknown)}, expected some of {', '.join(SIZES)}")
        python = options.torch_python if options.compare == "torch" else None
        side_by_side(sizes, options.rounds, python, options.json)
        return
    if options.preset is None:
        data = quickstart().data
        model, variants, what = quickstart().model_config(BYTES), RECIPES, CONFIG
        batch_size, length = data.batch_size, data.length
    else:
        model, variants, what = PRESETS[options.preset], PRODUCTS, options.preset
        batch_size, length = 8, 512
    figures = {"config": what} | measure(
        model,
        variants,
        batch_size=options.batch_size or batch_size,
        length=options.length or length,
        rounds=options.rounds,
        statistics_every=options.statistics_every,
    )
    for name, cost in figures["cost_against_float32"].items():
        took, speed = figures["milliseconds"][name]["median"], figures["tokens_per_second"][name]["median"]
        low, high = 100 * cost["p10"], 100 * cost["p90"]
        print(
            f"{name:24s} {took:8.1f} ms per step, {speed:9.0f} tokens/s, {100 * cost['median']:+5.1f} % "
            f"[{low:+.1f}, {high:+.1f}]"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
