"""What the `run` of a study is made of: train, train on from other weights, measure weights as they are.

Each returns fields of a row of results. Trainings are kept in folders: one that is there already is read and
not repeated, one that another process is at is waited for, one that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bitnet_experiments.study import load_study, overridden
from bitnet_jax.models import Architecture, Transformer
from bitnet_jax.quantization import scales
from bitnet_jax.quantization.recipes import HEADS
from bitnet_jax.training.config import RunConfig, differing_fields
from bitnet_jax.training.load import load_run
from bitnet_jax.training.loop import fit
from bitnet_jax.training.metrics import read_metrics
from bitnet_jax.training.run_folder import RunError, RunFolder
from bitnet_jax.training.task import Task, abstract_variables, language_task
from bitnet_jax.training.tasks import TASKS

RESULT_FIELDS = ("status", "step", "tokens", "parameters", "config_hash")


def train(config: RunConfig, folder: Path, task: Callable[[RunConfig], Task] | None = None) -> dict[str, Any]:
    """Train from scratch in `folder`; `task` in place of the config's may alter the problem (its start, its loss).

    A training under other settings is never gone on with: one that was not finished is replaced.

    Returns:
      status, step, tokens, parameters, config_hash, training_seconds (over all interruptions), error (of a
      divergence), valid_* and train_* (newest measurements), history (held-out loss over steps), and those of `sizes`.

    Raises:
      RunError: the folder holds a finished training under other settings.
    """
    with locked(folder.with_name(folder.name + ".lock")):
        run = RunFolder(folder)
        others = differing_fields(run.read_config(), config) if run.trained() else []
        if others and run.read_result() is not None:
            raise RunError(
                f"{folder} holds a finished training with other settings ({'; '.join(others)}; saved, then asked "
                "for); remove it to train again"
            )
        result = fit(config, folder, overwrite=bool(others), task=task)
    valid = [row for row in read_metrics(run.metrics) if row["kind"] == "valid"]
    row = {name: result[name] for name in RESULT_FIELDS} | {"training_seconds": result["seconds"]}
    if config.task == "images":
        row |= sizes(config.image_model_config())
    else:
        row |= sizes(config.model_config(run.read_tokenizer().vocab_size))
    if result["message"]:
        row["error"] = result["message"]
    for kind in ("valid", "train"):
        row |= {f"{kind}_{name}": value for name, value in result.get(kind, {}).items()}
    return row | {"history": [{"step": m["step"], "valid_loss": m["loss"]} for m in valid]}


def train_from(params: PyTree, config: RunConfig, folder: Path) -> dict[str, Any]:
    """`train`, started from weights in place of random ones; what they lack (learned scales) is initialized."""

    def task(config: RunConfig) -> Task:
        from_scratch = language_task(config)
        assert from_scratch.tokenizer is not None  # of a language
        model = Transformer(config.model_config(from_scratch.tokenizer.vocab_size))

        def init(key: jax.Array) -> PyTree:
            tokens = jnp.zeros((1, 1), jnp.int32)
            _, made = model.apply({"params": params}, tokens, mutable=["params"], rngs={"params": key})
            return {"params": made["params"]}

        return from_scratch._replace(init=init)

    return train(config, folder, task)


def model_of(
    study: str, arm: str, seed: int, workdir: Path, small: bool
) -> tuple[dict[str, Any], RunConfig, PyTree]:
    """Another study's model, trained now if it is not there yet: fields of its row, its config, its parameters.

    It is looked for where that study keeps its own, beside `workdir`, which is that of the study that asks.
    """
    other = load_study(study)
    folder = workdir.parent / other.workdir(small).name / f"{arm}-seed{seed}"
    row = train(other.settings(arm, seed, small), folder)
    config, _, params, _ = load_run(folder)
    return row, config, params


def measure(
    config: RunConfig, params: PyTree, model_state: Mapping[str, PyTree] | None = None, **overrides: Any
) -> dict[str, Any]:
    """valid_* of weights, under a config that may differ from the one they were trained with, untrained.

    Args:
      model_state: what the model keeps beside its parameters, such as batch statistics.
      overrides: fields of `model`, such as precision="int4".
    """
    fields = {f"model.{name}": value for name, value in overrides.items()}
    config = RunConfig.from_dict(overridden(config.to_dict(), fields))
    values = TASKS[config.task](config).evaluate({"params": params, **(model_state or {})})
    return {"status": "finished", "config_hash": config.hash()} | {f"valid_{n}": v for n, v in values.items()}


def sizes(model: Architecture) -> dict[str, float]:
    """weight_bits, of information per weight of all linear layers but the head, and model_bytes of the whole model.

    A ternary weight counts log2(3) bits, for nothing that stores it can do with less. Scales and all that is not
    such a weight (embeddings, head, norms, statistics) count four bytes a number.
    """
    precisions, weights, bits, numbers, counted = model.precisions(), 0, 0.0, 0, set()
    for path, (n, k) in model.linear_shapes().items():
        if path not in HEADS:
            precision = precisions[path]
            counted |= {f"{path}/weight", f"{path}/weight_scale"}
            weights, bits = weights + n * k, bits + n * k * precision.weight_bits
            if precision.quantizes_weights:
                matrix = jax.ShapeDtypeStruct((n, k), jnp.float32)
                numbers += jax.eval_shape(
                    partial(scales.measure, jnp.max, granularity=precision.granularity), matrix
                ).size
    for place, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(model)):
        name = jax.tree_util.keystr(place[1:], simple=True, separator="/")  # behind the collection
        if name not in counted:
            numbers += math.prod(leaf.shape)
    return {"weight_bits": bits / weights, "model_bytes": bits / 8 + 4 * numbers}


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock file, which dies with its process; gives False where another holds it and `wait` is not set.

    The lock is the kernel's (flock): on a network file system it holds as far as that file system keeps it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
