"""Checks before any work: the model can be packed, and training can fit in memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from bitnet_jax.models import Architecture, ModelConfig
from bitnet_jax.packed.packing import check_packable
from bitnet_jax.training.adapter_task import adapted_layers
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.optimizers import OptimizerConfig

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_trainable(config: RunConfig) -> None:
    """Cheap checks of a run before its data is read or its model is built.

    Raises:
      ValueError: a matrix could not be packed after training, or training needs more memory than available.
    """
    model = _model(config)
    check_packable(model)
    needed, available = min_training_bytes(config), memory_bytes(config)
    if needed > available:
        raise ValueError(
            f"config: got {parameters(model):,} parameters and batches of {config.data.batch_size:,}, which need at "
            f"least {needed / 1e9:,.1f} GB to train ({state_bytes(config.optimizer)} bytes per parameter), "
            f"expected at most the available {available / 1e9:,.1f} GB; choose a smaller model, data.batch_size or "
            "evaluation.batch_size"
        )


def min_training_bytes(config: RunConfig) -> int:
    """A lower bound on peak memory in training: parameters, gradients, optimizer state, a batch and its logits.

    Activations saved for the backward pass are not counted; most runs need several times as much.
    """
    model, data = _model(config), config.data
    if config.task == "images":
        inputs, outputs = 4 * getattr(model, "image_size", 0) ** 2 * getattr(model, "channels", 1), 0
    else:
        assert isinstance(model, ModelConfig)
        inputs = 8 * data.length  # tokens and targets
        outputs = 4 * data.length * (model.vocab_size if config.task == "language" else model.hidden_size)
    rows = max(_micro_batch(config), config.evaluation.batch_size)
    trained = parameters(model)
    if (rank := config.adapter.rank) is not None:
        assert isinstance(model, ModelConfig)
        trained = rank * sum(sum(shape) for shape in adapted_layers(config.adapter, model).values())
    return state_bytes(config.optimizer) * trained + data.batch_size * inputs + rows * outputs


def state_bytes(config: OptimizerConfig) -> int:
    """Per parameter at least: float32 weight and gradient, two moments of Adam or one of Muon, and an average.

    Frozen parameters have no gradient and no moments; where there are some, all are counted as if they were.
    """
    average = 4 if config.ema_decay is not None else 0
    if 0 in (config.rates or {}).values():
        return 4 + average
    moments = {"adamw": 2, "muon": 1}[config.name] * jnp.dtype(config.moments).itemsize
    return 8 + moments + average


def parameters(model: Architecture) -> int:
    """Number of parameters in the matrices and embedding tables of a model, without gains and biases."""
    count = sum(n * k for n, k in model.linear_shapes().values())
    if isinstance(model, ModelConfig):
        count += model.vocab_size * model.hidden_size
        count += model.max_length * model.hidden_size if model.position == "learned" else 0
    return count


def memory_bytes(config: RunConfig) -> int:
    """Total memory of the devices in the run's mesh; on CPU that of the machine or, if smaller, its cgroup.

    Several processes are assumed to run on separate machines, each like this one.
    """
    mesh, processes = config.mesh, jax.process_count()
    devices = jax.local_devices()[: mesh.devices]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    if devices[0].platform != "cpu" and all(limits):
        return processes * sum(limit for limit in limits if limit)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(Path, CGROUP_LIMITS):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            machine = min(machine, int(limit.read_text()))
    return processes * machine


def _model(config: RunConfig) -> Architecture:
    if config.task == "images":
        return config.image_model_config()
    return config.model_config(config.model.get("vocab_size", 256))


def _micro_batch(config: RunConfig) -> int:
    return config.data.batch_size // config.training.accumulate
