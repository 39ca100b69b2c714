"""The inputs of the linear layers of one block, on calibration text that runs through the blocks before it.

A block is computed in stages: the linear layers of a stage have one input, and those of the stages before are rounded
already, so the inputs of each layer are those that it will have in the packed model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax.models.stacked import layer_precisions
from bitnet_jax.models.transformer import Block, ModelConfig
from bitnet_jax.nn.embedding import Embedding
from bitnet_jax.nn.linear import BitLinear, dense
from bitnet_jax.nn.norms import block_norm
from bitnet_jax.quantization.precision import Precision

Weights = Mapping[str, Array | np.ndarray]  # of linear layers, by path
BATCH_TOKENS = 4096  # of calibration text that run through a block at once


def windows(blocks: Iterable[Int[np.ndarray, "n"]], length: int, count: int) -> Int[np.ndarray, "B T"]:
    """The first `count` windows of `length` tokens of a text; fewer if it has no more whole ones.

    Args:
      blocks: the tokens of the text; no more of them are asked for than needed.

    Raises:
      ValueError: the text is shorter than a window.
    """
    tokens = np.zeros(0, np.int32)
    for block in blocks:
        tokens = np.concatenate([tokens, block.astype(np.int32)])
        if len(tokens) >= length * count:
            break
    whole = min(len(tokens) // length, count)
    if not whole:
        raise ValueError(
            f"got a calibration text of {len(tokens)} tokens, expected at least one window of {length}; use a longer "
            "text"
        )
    return tokens[: whole * length].reshape(whole, length)


def stages(config: ModelConfig) -> list[tuple[str, ...]]:
    """The linear layers of a block, those with the same input together, in the order of the forward pass."""
    *inner, last = config.mlp_linears
    return [
        ("attention/q_proj", "attention/k_proj", "attention/v_proj"),
        ("attention/o_proj",),
        tuple(f"mlp/{name}" for name in inner),
        (f"mlp/{last}",),
    ]


def embedded(config: ModelConfig, params: Mapping[str, Any], tokens: Int[np.ndarray, "B T"]) -> np.ndarray:
    """The input of the first block, float32 [B, T, D]."""

    @jax.jit
    def rows(params: Mapping[str, Any], tokens: Array) -> Array:
        def table(name: str, rows: int, ids: Array) -> Array:
            found: Any = Embedding.of(config, rows, name).apply({"params": params[name]}, ids)
            return found

        x = table("embed", config.vocab_size, tokens)
        if config.position == "learned":
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            x = x + table("position_embed", config.max_length, positions)
        if config.norm_placement == "post":
            normalized: Any = block_norm(config, "embed_norm").apply(
                {"params": params.get("embed_norm", {})}, x
            )
            return normalized
        return x

    return np.array(rows(params, jnp.asarray(tokens)), np.float32)  # a copy that can be written


class Stream:
    """Activations of the calibration text before one block; they run through it once it is rounded.

    A layer multiplies its quantized input by its rounded weights in float32, not by the packed kernel: the same product
    but for the rounding of sums.
    """

    def __init__(self, config: ModelConfig, activations: Float[np.ndarray, "B T D"]):
        self.config, self.x = config, activations
        self.rows = max(1, BATCH_TOKENS // activations.shape[1])

    def moment(
        self, layer: int, others: Mapping[str, Any], weights: Weights, path: str
    ) -> Float[np.ndarray, "k k"]:
        """mean(x^T x), float64, of the quantized input of the linear layer `path` of a block.

        Args:
          layer: index of the block.
          others: the parameters of the block that are not matrices.
          weights: path -> the rounded weights of all linear layers in earlier stages.
        """
        total: Any = 0.0
        for _, batch in self._batches():
            x = np.asarray(_input(*_static(self.config, layer), path, others, weights, batch))
            total = total + (x.T @ x).astype(np.float64)
        return total / (self.x.shape[0] * self.x.shape[1])

    def advance(self, layer: int, others: Mapping[str, Any], weights: Weights) -> None:
        """Runs the text through a block with rounded weights."""
        for part, batch in self._batches():
            self.x[part] = np.asarray(after_block(self.config, layer, others, weights, batch))

    def _batches(self) -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(self.x), self.rows):
            part = slice(start, start + self.rows)
            yield part, self.x[part]


def after_block(
    config: ModelConfig,
    layer: int,
    others: Mapping[str, Any],
    weights: Weights,
    x: Float[Array | np.ndarray, "B T D"],
) -> Float[Array, "B T D"]:
    """The output of a block. Arguments: see `Stream.moment`; weights are those of all its linear layers."""
    return _output(*_static(config, layer), others, weights, x)


def _static(config: ModelConfig, layer: int) -> tuple[ModelConfig, tuple[tuple[str, Precision], ...], bool]:
    precisions = layer_precisions(config)[layer]
    return config, tuple(precisions.items()), layer not in config.no_rope_layers


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _input(
    config: ModelConfig,
    precisions: Sequence[tuple[str, Precision]],
    rotary: bool,
    path: str,
    others: Mapping[str, Any],
    weights: Weights,
    x: Float[Array, "B T D"],
) -> Float[Array, "N k"]:
    """The quantized input of one linear layer. What comes after it is not computed: XLA drops what is not returned."""
    inputs: dict[str, Array] = {}
    _block(config, precisions, rotary, others, weights, x, inputs)
    return inputs[path].reshape(-1, inputs[path].shape[-1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _output(
    config: ModelConfig,
    precisions: Sequence[tuple[str, Precision]],
    rotary: bool,
    others: Mapping[str, Any],
    weights: Weights,
    x: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
    return _block(config, precisions, rotary, others, weights, x, {})


def _block(
    config: ModelConfig,
    precisions: Sequence[tuple[str, Precision]],
    rotary: bool,
    others: Mapping[str, Any],
    weights: Weights,
    x: Float[Array, "B T D"],
    inputs: dict[str, Array],
) -> Float[Array, "B T D"]:
    """The output of a block, in which layers without weights give zeros; `inputs` gets those of all linear layers."""

    def rounded(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer: Any = context.module
        if not isinstance(layer, BitLinear) or context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(layer.path)
        inputs[path] = x = layer.precision.quantize_activation(args[0]).dequantize()
        if path not in weights:
            return jnp.zeros((*x.shape[:-1], layer.features), x.dtype)
        y = dense(x, jnp.asarray(weights[path]))
        if layer.use_bias:
            y = y + jnp.expand_dims(layer.get_variable("params", "bias"), range(y.ndim - 1))
        return y

    B, T, _ = x.shape
    positions = jnp.arange(T, dtype=jnp.int32)
    visible = positions[None, :] <= positions[:, None]
    if config.sliding_window is not None:
        visible &= positions[:, None] - positions[None, :] < config.sliding_window
    with nn.intercept_methods(rounded):
        y, _ = Block(config, dict(precisions), deterministic=True, rotary=rotary).apply(
            {"params": others},
            x,
            positions=jnp.broadcast_to(positions, (B, T)),
            visible=jnp.broadcast_to(visible, (B, T, T)),
            key_mask=jnp.ones((B, T), bool),
            cache=None,
            length=None,
            progress=1.0,
        )
    return y
