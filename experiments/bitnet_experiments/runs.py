"""Building blocks for the `run` function of a study: training, fine-tuning, and evaluation of given weights.

Each returns fields of a row of results. Training runs are kept in folders: a finished one is read instead of repeated,
one that another process is working on is waited for, and an interrupted one is resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bitnet_experiments.origin import origin, same_origin
from bitnet_experiments.study import TEST, load_study, overridden
from bitnet_experiments.tuning import chosen
from bitnet_jax.models import Architecture, Transformer
from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.embedding import stored_dtype
from bitnet_jax.nn.tables import table_precision
from bitnet_jax.quantization import scales
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import HEADS
from bitnet_jax.training.config import RunConfig, differing_fields
from bitnet_jax.training.load import load_run
from bitnet_jax.training.loop import fit
from bitnet_jax.training.metrics import read_metrics
from bitnet_jax.training.run_folder import RunFolder, write_atomic
from bitnet_jax.training.task import Task, abstract_variables, language_task
from bitnet_jax.training.tasks import TASKS

RESULT_FIELDS = ("status", "step", "tokens", "parameters", "config_hash")


def train(config: RunConfig, folder: Path, task: Callable[[RunConfig], Task] | None = None) -> dict[str, Any]:
    """Trains from scratch in `folder`; `task` replaces the config's task, to change its initialization or loss.

    A run is resumed, or taken as it is, only if its settings and its origin (machine and code, see origin.py) are those
    of now. Another one is kept beside it as `<folder>.stale`.

    Returns:
      status, step, tokens, parameters, config_hash, training_seconds (summed over interruptions), training_flops (of
      the model's products, however they were computed), mfu (their share of the machine's peak), error (if it
      diverged), valid_* and train_* (latest values), test_* (with data.test), history (held-out loss over steps), and
      the fields of `sizes`.
    """
    with locked(folder.with_name(folder.name + ".lock")):
        run = RunFolder(folder)
        _set_aside_others(run, config)
        result = fit(config, folder, task=task)
    valid = [row for row in read_metrics(run.metrics) if row["kind"] == "valid"]
    row = {name: result[name] for name in RESULT_FIELDS} | {"training_seconds": result["seconds"]}
    if (per_token := result["record"]["flops_per_token"]) is not None:
        row["training_flops"] = per_token * result["tokens"]
    if (mfu := result["record"]["mfu"]) is not None:
        row["mfu"] = mfu
    if config.task == "images":
        row |= sizes(config.image_model_config())
    else:
        row |= sizes(config.model_config(run.read_tokenizer().vocab_size))
    if result["message"]:
        row["error"] = result["message"]
    row |= {name: value for name, value in result.items() if name.startswith(TEST)}
    for kind in ("valid", "train"):
        row |= {f"{kind}_{name}": value for name, value in result.get(kind, {}).items()}
    return row | {"history": [{"step": m["step"], "valid_loss": m["loss"]} for m in valid]}


def _set_aside_others(run: RunFolder, config: RunConfig) -> None:
    """Leaves in the folder only what this code would have computed here under these settings."""
    file, here = run.path.with_name(run.path.name + ".origin.json"), origin()
    if run.trained():
        then = json.loads(file.read_text()) if file.is_file() else {}
        if differing_fields(run.read_config(), config) or not same_origin(then, here):
            aside = run.path.with_name(run.path.name + ".stale")
            shutil.rmtree(aside, ignore_errors=True)
            run.path.rename(aside)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(here) + "\n")


def train_from(params: PyTree, config: RunConfig, folder: Path) -> dict[str, Any]:
    """`train`, initialized from `params`; parameters missing in them (learned scales) are newly initialized."""

    def task(config: RunConfig) -> Task:
        from_scratch = language_task(config)
        assert from_scratch.tokenizer is not None  # it is a language task
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
    """Another study's model, trained first if necessary: fields of its row, its config, its parameters.

    It is kept in the workdir of that study, next to `workdir`, that of the calling study.
    """
    other = load_study(study)
    work = workdir.parent / other.workdir(small).name
    tuned = chosen(other, work / "tuning.jsonl" if small else None)
    if other.tune and arm not in tuned:
        raise ValueError(
            f"{study}: got no tuned values of {arm!r}, expected some; run bitnet-jax sweep {study} first"
        )
    folder = work / f"{arm}-seed{seed}"
    row = train(other.settings(arm, seed, small, tuned.get(arm)), folder)
    config, _, params, _ = load_run(folder)
    return row, config, params


def measure(
    config: RunConfig, params: PyTree, model_state: Mapping[str, PyTree] | None = None, **overrides: Any
) -> dict[str, Any]:
    """valid_* of given weights without training, under a config that may differ from that of their training.

    With data.test also test_*.

    Args:
      model_state: collections besides the parameters, such as batch statistics.
      overrides: fields of `model`, such as precision="int4".
    """
    fields = {f"model.{name}": value for name, value in overrides.items()}
    config = RunConfig.from_dict(overridden(config.to_dict(), fields))
    task, variables = TASKS[config.task](config), {"params": params, **(model_state or {})}
    row: dict[str, Any] = {"status": "finished", "config_hash": config.hash()}
    for part, metrics in (("valid_", task.evaluate), (TEST, task.test)):
        row |= {f"{part}{n}": v for n, v in metrics(variables).items()} if metrics is not None else {}
    return row


def sizes(model: Architecture) -> dict[str, float]:
    """weight_bits, the bits of information per weight of all linear layers except the head, and model_bytes in total.

    A ternary weight counts as log2(3) bits, the information-theoretic minimum. Tables of integers have their bits and
    scales. Scales of linear layers and all else (float tables, norms, statistics) count as four bytes per number.
    """
    precisions, weights, bits, numbers, counted = model.precisions(), 0, 0.0, 0, set()
    tables = 0.0
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
        name = jax.tree_util.keystr(place[1:], simple=True, separator="/")  # without the collection
        table = _integer_table(model, name)
        if table is not None:
            assert isinstance(table.granularity, int)
            per_row = leaf.shape[1] * table.weight_bits / 8
            per_row += leaf.shape[1] // table.granularity * jnp.dtype(table.scale_dtype).itemsize
            tables += leaf.shape[0] * per_row
        elif name not in counted:
            numbers += math.prod(leaf.shape)
    return {"weight_bits": bits / weights, "model_bytes": bits / 8 + tables + 4 * numbers}


def _integer_table(model: Architecture, leaf: str) -> Precision | None:
    """The precision of a leaf that is an embedding table, or a head, of integers; None for any other."""
    if not isinstance(model, TransformerShape) or leaf not in ("embed/embedding", "lm_head/weight"):
        return None
    return table_precision(stored_dtype(model, leaf.partition("/")[0]), model.hidden_size)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file, released with the process; yields False if another process holds it and `wait` is False.

    The lock is a flock; on a network file system it depends on that file system's support.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
