"""The matrix products of a decode step, kind by kind and alone: what a benchmark holds against the whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from bitnet_jax.models.transformer import Embedding
from bitnet_jax.nn.config import ModelConfig
from bitnet_kernels import PackedArray, packed_matmul
from bitnet_kernels.timing import Product, chain

Call = Callable[[int], Any]


def step_kernels(config: ModelConfig, variables: Mapping[str, Any], steps: int) -> dict[str, Call]:
    """Kind of product -> call(round) that makes all products of that kind of `steps` decode steps, and no other.

    A kind is what has one shape, format and kind of input. The weights are the model's own, each used once a step
    as in the model, and each product waits for the one before. Inputs are quantized already.
    """
    params, packed = (flat(variables.get(name, {})) for name in ("params", "packed"))
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path, precision in config.precisions().items():
        weight = packed.get(f"{path}/weight")
        if weight is None:
            weight = params[f"{path}/weight"]
            kind: tuple[Any, ...] = (str(weight.dtype), _float_product, jnp.float32)
        elif precision.activation == "none":
            kind = (f"{weight.format} of float inputs", _weight_only_product, jnp.float32)
        else:
            kind = (weight.format, packed_matmul, jnp.int8)
        kinds.setdefault((weight.shape, *kind), {})[path] = weight
    calls: dict[str, Call] = {}
    for ((n, k), stored, product, dtype), weights in kinds.items():
        names = dict.fromkeys(path.rpartition("/")[2] for path in weights)
        run = chain(product, jnp.ones((1, k), dtype), list(weights.values()), len(weights), steps)
        calls[f"{', '.join(names)} {n} x {k} {stored}"] = run
    if config.tie_embeddings and not config.num_classes:
        table = params["embed/embedding"]
        x = jnp.ones((1, config.hidden_size), config.dtype)
        calls["head {} x {} {}".format(*table.shape, table.dtype)] = chain(
            _tied_head(config), x, [table], 1, steps
        )
    return calls


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path with slashes -> leaf."""
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def _float_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("mk,nk->mn", x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _weight_only_product(x: jax.Array, w: PackedArray) -> jax.Array:
    return packed_matmul(x, w, activation_bits=None)


def _tied_head(config: ModelConfig) -> Product:
    embed = Embedding(
        config.vocab_size, config.hidden_size, config.embedding_dtype, config.dtype, config.init_std
    )

    def head(x: jax.Array, table: jax.Array) -> jax.Array:
        logits: Any = embed.apply({"params": {"embedding": table}}, x[None], method="attend")
        return logits[0]

    return head
