"""Loading a checkpoint of a run: settings, model, latent weights, tokenizer and classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from bitnet_jax.data import Classes, Tokenizer
from bitnet_jax.data.conversation import Conversation, of_documents
from bitnet_jax.models import Architecture, ModelConfig
from bitnet_jax.packed.adapters import Adapter
from bitnet_jax.training.adapter_task import adapted, new_adapter, read_base, trained_adapter
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.run_folder import RunError, RunFolder
from bitnet_jax.training.task import abstract_variables


class LoadedRun(NamedTuple):
    config: RunConfig
    model: Architecture
    # Latent parameters and, if the model has them, batch statistics; of a run of an adapter, the packed model with it
    variables: dict[str, Any]
    tokenizer: Tokenizer | None  # only for runs on text
    classes: Classes | None  # only for classifiers
    conversation: Conversation  # begin and end tokens of a text


def read_run(workdir: str | Path, step: int | None = None) -> LoadedRun:
    """One checkpoint (default: the newest) of a run of any task.

    Raises:
      RunError, CheckpointError: no run, no such checkpoint, or a file that is damaged or was changed after training.
    """
    folder = RunFolder(workdir)
    config = folder.read_config()
    if config.adapter.rank is not None:
        return _read_adapter_run(folder, config, step)
    tokenizer = None if config.task == "images" else folder.read_tokenizer()
    model = config.image_model_config() if tokenizer is None else config.model_config(tokenizer.vocab_size)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        restored = checkpoints.restore(
            abstract_variables(model), step=step, check=partial(folder.check_meta, config)
        )
    conversation = of_documents(tokenizer)
    if config.task == "sentence_vectors":
        begin, end = (tuple(ids or ()) for ids in (config.data.begin_tokens, config.data.end_tokens))
        conversation = Conversation(begin, end)
    return LoadedRun(config, model, restored.variables, tokenizer, folder.read_classes(), conversation)


def _read_adapter_run(folder: RunFolder, config: RunConfig, step: int | None) -> LoadedRun:
    """The packed model that the run began with, and its adapter. Raises ValueError: it is not there any more."""
    base = read_base(config)
    variables = adapted(base.variables, _adapter_params(folder, config, step), config.adapter)
    return LoadedRun(config, base.config, variables, base.tokenizer, None, base.conversation)


def _adapter_params(folder: RunFolder, config: RunConfig, step: int | None) -> PyTree:
    model = config.model_config(config.model["vocab_size"])
    shapes = {"params": jax.eval_shape(partial(new_adapter, config.adapter, model), jax.random.key(0))}
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        restored = checkpoints.restore(shapes, step=step, check=partial(folder.check_meta, config))
    return restored.variables["params"]


def read_adapter(workdir: str | Path, step: int | None = None) -> Adapter:
    """The adapter of a run; the packed model is not read.

    Raises RunError, CheckpointError: as `read_run`, or a run without an adapter.
    """
    folder = RunFolder(workdir)
    config = folder.read_config()
    if config.adapter.rank is None:
        raise RunError(f"{folder.path}: got a run without an adapter, expected one with config.adapter.rank")
    return trained_adapter(config, _adapter_params(folder, config, step))


def load_run(
    workdir: str | Path, step: int | None = None
) -> tuple[RunConfig, ModelConfig, dict[str, Any], Tokenizer]:
    """Settings, model, latent parameters and tokenizer of a run on text; otherwise like `read_run`."""
    folder = RunFolder(workdir)
    if folder.read_config().task == "images":
        raise RunError(f"{folder.path}: got a run on images, expected one on text; use load_image_run")
    config, model, variables, tokenizer, *_ = read_run(workdir, step)
    assert isinstance(model, ModelConfig)
    assert tokenizer is not None
    return config, model, variables["params"], tokenizer


def load_image_run(
    workdir: str | Path, step: int | None = None
) -> tuple[RunConfig, Architecture, dict[str, Any]]:
    """Settings, model and variables (parameters, batch statistics) of a run on images; otherwise like `read_run`."""
    folder = RunFolder(workdir)
    if (task := folder.read_config().task) != "images":
        raise RunError(f"{folder.path}: got a run of task {task!r}, expected images")
    return read_run(workdir, step)[:3]
