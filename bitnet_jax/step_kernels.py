"""The matrix products of a decode step, kind by kind and alone: what a benchmark holds against the whole step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from bitnet_jax.nn.config import ModelConfig
from bitnet_jax.nn.embedding import Embedding
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
        if path == "lm_head" and not precision.quantizes_weights:
            weight = params[f"{path}/weight"]
            kind: tuple[Any, ...] = (
                str(weight.dtype),
                _float_head(Embedding.head(config, precision)),
                jnp.float32,
            )
        elif weight is None:
            weight = params[f"{path}/weight"]
            kind = (str(weight.dtype), _float_product, jnp.float32)
        elif precision.activation == "none":
            kind = (f"{weight.format} of float inputs", _weight_only_product, jnp.float32)
        else:
            kind = (weight.format, packed_matmul, jnp.int8)
        kinds.setdefault((weight.shape, *kind), {})[path] = weight
    if config.tie_embeddings and config.head == "float" and not config.num_classes:
        table = params["embed/embedding"]
        head = _float_head(Embedding.of(config, config.vocab_size, "embed"))
        kinds[table.shape, str(table.dtype), head, jnp.float32] = {"head": table}
    calls: dict[str, Call] = {}
    for ((n, k), stored, product, dtype), weights in kinds.items():
        names = dict.fromkeys(path.rpartition("/")[2] for path in weights)
        run = chain(product, jnp.ones((1, k), dtype), list(weights.values()), len(weights), steps)
        calls[f"{', '.join(names)} {n} x {k} {stored}"] = run
    return calls


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path with slashes -> leaf."""
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def _float_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("mk,nk->mn", x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _weight_only_product(x: jax.Array, w: PackedArray) -> jax.Array:
    return packed_matmul(x, w, activation_bits=None)


def _float_head(module: Embedding) -> Product:
    def head(x: jax.Array, table: jax.Array) -> jax.Array:
        logits: Any = module.apply({"params": {module.parameter: table}}, x[None], method="attend")
        return logits[0]

    return head
