"""What fake quantization costs in training: the time of a step, recipe against float32, measured in turn.

    python -m experiments.training_cost --json cost.json

One jitted update (loss, gradient, AdamW, statistics of the codes) of the quickstart's byte-level model on random
tokens. Every round times one step of every recipe, so that the ratios are of one machine state.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_jax.config_file import load_config_file
from bitnet_jax.models import Transformer
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.optimizers import make_optimizer
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import TrainStep, make_train_step
from bitnet_jax.training.task import init_variables, model_loss
from experiments.provenance import provenance

CONFIG = Path(__file__).parent / "configs" / "quickstart.py"
RECIPES = ("float32", "bitnet_b158", "bitnet")
BYTES = 256  # vocabulary


def training_step(recipe: str) -> tuple[TrainStep, TrainState, dict[str, np.ndarray]]:
    """The update of the quickstart's model in a recipe, its first state, and a random batch."""
    fields = load_config_file(str(CONFIG), []).to_dict()
    fields["model"]["precision"] = recipe
    config = RunConfig.from_dict(fields)
    model = config.model_config(BYTES)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    state = TrainState.create(init_variables(model, jax.random.key(0)), optimizer)
    step = make_train_step(
        model_loss(Transformer(model)),
        optimizer,
        total_steps=config.training.steps,
        precisions={path: p for path, p in model.precisions().items() if p.quantizes_weights},
    )
    tokens = np.random.default_rng(0).integers(0, BYTES, (config.data.batch_size, config.data.length + 1))
    return step, state, {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}


def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds of a step per recipe, and the cost of each against float32: medians with p10 and p90."""
    steps, states, batches = {}, {}, {}
    for recipe in RECIPES:
        steps[recipe], states[recipe], batches[recipe] = training_step(recipe)
    key = jax.random.key(1)
    times: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    for number in range(-2, rounds):  # the first two compile and warm up
        for recipe, step in steps.items():
            began = time.perf_counter()
            states[recipe], metrics = step(states[recipe], batches[recipe], key)
            jax.block_until_ready((states[recipe], metrics))
            if number >= 0:
                times[recipe].append(time.perf_counter() - began)
    baseline = np.array(times["float32"])

    def spread(values: np.ndarray) -> dict[str, float]:
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        return {"median": float(median), "p10": float(p10), "p90": float(p90)}

    return {
        "config": CONFIG.name,
        "rounds": rounds,
        "milliseconds": {recipe: spread(1e3 * np.array(took)) for recipe, took in times.items()},
        "cost_against_float32": {
            recipe: spread(np.array(took) / baseline - 1) for recipe, took in times.items()
        },
        "provenance": provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each recipe (default 40)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    figures = measure(options.rounds)
    for recipe, cost in figures["cost_against_float32"].items():
        took = figures["milliseconds"][recipe]["median"]
        low, high = 100 * cost["p10"], 100 * cost["p90"]
        print(f"{recipe:12s} {took:7.1f} ms a step, {100 * cost['median']:+5.1f} % [{low:+.1f}, {high:+.1f}]")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
