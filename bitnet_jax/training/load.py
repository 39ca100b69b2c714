"""Loading a checkpoint of a run: settings, model, latent weights, tokenizer and classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bitnet_jax.data import Classes, Tokenizer
from bitnet_jax.data.conversation import Conversation, of_documents
from bitnet_jax.models import Architecture, ModelConfig
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.run_folder import RunError, RunFolder
from bitnet_jax.training.task import abstract_variables


class LoadedRun(NamedTuple):
    config: RunConfig
    model: Architecture
    variables: dict[str, Any]  # latent parameters and, if the model has them, batch statistics
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
