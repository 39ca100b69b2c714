"""The kernels of a decode step alone, which a benchmark compares with the whole step.

Products of packed or float matrices (fused where the model fuses them, with the quantization of their input), attention
over the cache, and the head; no norms, rotary embeddings or sampling. They run in the model's order and on its own
weights, because kernels are bound by memory: a few matrices used repeatedly would be read from a processor cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from bitnet_jax.inference.cache import init_cache
from bitnet_jax.models import ModelConfig
from bitnet_jax.nn.embedding import Embedding
from bitnet_jax.nn.linear import packed_product
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.scales import Quantized
from bitnet_kernels import PackedArray, cached_attention, packed_matmuls
from bitnet_kernels.kv_cache import KVCache

Call = Callable[[int], Any]
FUSED_PROJECTIONS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def step_kernels(
    config: ModelConfig, variables: Mapping[str, Any], steps: int, length: int, kv_format: str | None = None
) -> Call:
    """A call(round) that runs the kernels of `steps` decode steps with `length` positions in the cache.

    Each kernel depends on the result of the previous one.
    """
    cache = init_cache(config, 1, length, kv_format).layers

    @jax.jit
    def run(variables: Mapping[str, Any], layers: Sequence[Any]) -> jax.Array:
        params, packed = (
            flatten_dict(dict(variables.get(name, {})), sep="/") for name in ("params", "packed")
        )

        def step(_: Any, wait: jax.Array) -> jax.Array:
            for paths in _calls(config):
                layer = (
                    layers[int(paths[0].partition("/")[0].removeprefix("layers_"))]
                    if "/" in paths[0]
                    else None
                )
                if (
                    paths[0].endswith("/o_proj")
                    and isinstance(layer, KVCache)
                    and config.attention == "softmax"
                ):
                    wait = _after(_attend(config, layer, wait))
                wait = _after(_multiply(config, params, packed, paths, wait))
            return wait

        return jax.lax.fori_loop(0, steps, step, jnp.zeros((), jnp.float32))

    return lambda round: run(variables, cache).block_until_ready()


def _calls(config: ModelConfig) -> list[list[str]]:
    """Paths of the linear layers in order, with fused ones in one list; a tied float head at the end."""
    calls: list[list[str]] = []
    for path in config.linear_shapes():
        folder, _, name = path.rpartition("/")
        last = calls[-1][-1].rpartition("/") if calls else ("", "", "")
        together = last[0] == folder and any({last[2], name} <= names for names in FUSED_PROJECTIONS)
        calls[-1].append(path) if together else calls.append([path])
    if config.head_is_table:
        calls.append(["embed"])
    return calls


def _after(y: jax.Array) -> jax.Array:
    """Zero, with a data dependency on y."""
    return jnp.where(y.reshape(-1)[0] == math.pi, 1.0, 0.0)


def _attend(config: ModelConfig, cache: KVCache, wait: jax.Array) -> jax.Array:
    length = cache.k.shape[1]
    return cached_attention(
        jnp.ones((1, 1, config.num_heads, config.head_size), jnp.float32) + wait,
        cache.k,
        cache.v,
        jnp.ones((1, 1, length), bool),
        config.score_scale,
        length=jnp.int32(length),
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
    )


def _multiply(
    config: ModelConfig,
    params: Mapping[str, Any],
    packed: Mapping[str, Any],
    paths: Sequence[str],
    wait: jax.Array,
) -> jax.Array:
    """The products of layers that share an input; one element of each output."""
    if paths[0] == "embed":
        module = Embedding.of(config, config.vocab_size, "embed")
        return _attend_to(module, packed.get("embed/weight", params.get("embed/embedding")), wait)
    precisions = config.precisions()
    weights = {path: packed.get(f"{path}/weight", params.get(f"{path}/weight")) for path in paths}
    x = jnp.ones((1, weights[paths[0]].shape[1]), jnp.float32) + wait
    ys: list[jax.Array] = []
    fused: list[str] = []
    for bits in (8, 16):
        alike = [
            path
            for path, weight in weights.items()
            if isinstance(weight, PackedArray) and precisions[path].absmax_bits == bits
        ]
        if alike:
            ys += packed_matmuls(x, [weights[path] for path in alike], activation_bits=bits)
        fused += alike
    for path, weight in weights.items():
        if path not in fused:
            ys.append(_product(config, path, precisions[path], weight, x))
    return jnp.stack([y.reshape(-1)[0] for y in ys])


def _product(config: ModelConfig, path: str, precision: Precision, weight: Any, x: jax.Array) -> jax.Array:
    if path == "lm_head" and not precision.quantizes_weights:
        return _attend_to(Embedding.head(config, precision), weight, x[0, 0] - 1)
    if not isinstance(weight, PackedArray):
        return jnp.einsum("mk,nk->mn", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return packed_product(Quantized(x, jnp.ones((1, 1), jnp.float32)), weight, precision)


def _attend_to(module: Embedding, table: Any, wait: jax.Array) -> jax.Array:
    x = jnp.ones((1, 1, table.shape[1]), jnp.float32) + wait
    is_packed = isinstance(table, PackedArray)
    variables = {"packed": {"weight": table}} if is_packed else {"params": {module.parameter: table}}
    logits: Any = module.apply(variables, x, method="attend")
    return logits[0]
