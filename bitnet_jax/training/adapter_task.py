"""Training a low-rank adapter on a frozen packed model (section `adapter` of a config, nn/adapter.py).

    config.init = "smollm2-packed"       # weights, tokenizer and recipe; they do not change
    config.adapter.rank = 8

Only a and b of the adapted layers are parameters: checkpoints hold nothing else. The model is an argument of the
compiled update. A forward pass rounds a and b to bfloat16, as the file of the adapter stores them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from bitnet_jax.models import ModelConfig
from bitnet_jax.nn.adapter import COLLECTION
from bitnet_jax.nn.embedding import round_to_bfloat16
from bitnet_jax.packed import storage
from bitnet_jax.packed.adapters import Adapter, fingerprint, layer_shapes
from bitnet_jax.packed.packing import for_this_platform
from bitnet_jax.quantization.ste import straight_through
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.config_sections import AdapterConfig
from bitnet_jax.training.losses import LossSums
from bitnet_jax.training.sections import plain
from bitnet_jax.training.step import Batch, ModelState
from bitnet_jax.training.task import Task

BASE = "base"  # of the variables of the loss: those of the frozen model


def read_base(config: RunConfig) -> storage.PackedModel:
    """The packed model of `config.init`.

    Raises:
      ValueError: it is not a packed model of text, or not the one that the run began with, or its inputs are quantized
        in a way that no gradient passes.
      StorageError: damaged.
    """
    assert config.init is not None  # checked by RunConfig
    found = fingerprint(config.init)
    if config.adapter.base not in (None, found):
        raise ValueError(
            f"init: got {config.init}, the packed model {found}, expected {config.adapter.base}, with which the "
            "adapter was begun; restore it"
        )
    base = storage.load_packed(config.init)
    if not isinstance(base.config, ModelConfig) or base.config.num_classes or base.config.pooling != "none":
        raise ValueError(f"init: got {config.init}, expected a packed language model for an adapter")
    if base.tokenizer is None:
        raise ValueError(
            f"init: got {config.init} without {storage.TOKENIZER}, expected one to read text with; add it"
        )
    for path, precision in base.config.precisions().items():
        if precision.activation != "none" and not precision.absmax_bits:
            raise ValueError(
                f"init: got {config.init}, whose layer {path} has inputs of {precision.activation!r}, through which a "
                "packed matrix passes no gradient; expected inputs of 8 or 16 bits, or floats"
            )
    return base._replace(variables=for_this_platform(base.variables))


def with_base(config: RunConfig) -> RunConfig:
    """The settings with the model, the tokenizer and the fingerprint of `config.init`.

    Raises ValueError: see read_base; or a setting of the model or the tokenizer that the config should leave to it.
    """
    base = read_base(config)
    assert isinstance(base.config, ModelConfig)
    own = str((Path(config.init or "") / storage.TOKENIZER).absolute())
    if config.data.tokenizer not in ("byte", own):
        raise ValueError(
            f"data.tokenizer: got {config.data.tokenizer!r} beside init, expected it to be unset"
        )
    fields = plain(base.config.to_dict())
    del fields["trained_length"]
    for name, value in config.model.items():
        if name not in fields or fields[name] != plain(value):
            raise ValueError(
                f"model.{name}: got {value!r} with an adapter, expected {fields.get(name)!r}, as in {config.init}; "
                "remove it"
            )
    return dataclasses.replace(
        config,
        model=fields,
        data=dataclasses.replace(config.data, tokenizer=own),
        adapter=dataclasses.replace(config.adapter, base=fingerprint(config.init or "")),
    )


def adapted_layers(settings: AdapterConfig, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Path -> [n, k] of the layers with an adapter. Raises ValueError: a pattern that matches none."""
    shapes = layer_shapes(config)
    for pattern in settings.layers:
        if not fnmatch.filter(shapes, pattern):
            raise ValueError(
                f"adapter.layers: got {pattern!r}, which matches none of the layers, such as {next(iter(shapes))}"
            )
    return {
        path: shape
        for path, shape in shapes.items()
        if any(fnmatch.fnmatch(path, p) for p in settings.layers)
    }


def new_adapter(settings: AdapterConfig, config: ModelConfig, key: PRNGKeyArray) -> dict[str, PyTree]:
    """Parameters at the start (2106.09685): a is normal with deviation 1 / sqrt(k), b is 0: no change."""
    assert settings.rank is not None
    flat: dict[str, Any] = {}
    for i, (path, (n, k)) in enumerate(adapted_layers(settings, config).items()):
        a = jax.random.normal(jax.random.fold_in(key, i), (settings.rank, k), jnp.float32) / math.sqrt(k)
        flat |= {f"{path}/a": a, f"{path}/b": jnp.zeros((n, settings.rank), jnp.float32)}
    return unflatten_dict(flat, sep="/")


def adapted(base: Mapping[str, PyTree], params: PyTree, settings: AdapterConfig) -> dict[str, PyTree]:
    """The variables of the model with the adapter of `params`, rounded to bfloat16."""
    assert settings.rank is not None
    flat = {path: _rounded(value) for path, value in flatten_dict(params, sep="/").items()}
    scale = jnp.full(settings.rank, settings.alpha / settings.rank, jnp.float32)
    flat |= {path[:-1] + "scale": scale for path in flat if path.endswith("/a")}
    return {**base, COLLECTION: unflatten_dict(flat, sep="/")}


def _rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return straight_through(round_to_bfloat16(x), (x,), (jnp.ones_like(x),))


def adapter_task(task: Task, config: RunConfig) -> Task:
    """The task of a language model with the adapter as its only parameters.

    Args:
      task: of `config`, whose settings are those of `with_base`.
    """
    base, settings = read_base(config), config.adapter
    assert isinstance(base.config, ModelConfig)

    model = base.config

    def variables(found: Mapping[str, PyTree]) -> dict[str, PyTree]:
        return adapted(base.variables, found["params"], settings)

    def loss(
        found: Mapping[str, PyTree],
        batch: Batch,
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> tuple[LossSums, ModelState]:
        return task.loss(adapted(found[BASE], found["params"], settings), batch, key, progress)

    def create(key: PRNGKeyArray) -> dict[str, PyTree]:
        return {"params": new_adapter(settings, model, key)}

    return task._replace(
        init=create,
        loss=loss,
        frozen={BASE: base.variables},
        evaluate=lambda found: task.evaluate(variables(found)),
        test=None if task.test is None else partial(_of, task.test, variables),
        sample=None if task.sample is None else partial(_of, task.sample, variables),
        precisions={},
    )


def _of(measure: Any, variables: Any, found: Mapping[str, PyTree]) -> Any:
    return measure(variables(found))


def trained_adapter(config: RunConfig, params: PyTree) -> Adapter:
    """The adapter of a checkpoint's parameters, in the form of its file."""
    assert config.adapter.rank is not None
    assert config.adapter.base is not None
    flat = {
        path: np.asarray(value).astype(jnp.bfloat16) for path, value in flatten_dict(params, sep="/").items()
    }
    layers = {
        path[:-2]: (value, flat[path[:-1] + "b"]) for path, value in flat.items() if path.endswith("/a")
    }
    return Adapter(layers, config.adapter.alpha / config.adapter.rank, config.adapter.base)
