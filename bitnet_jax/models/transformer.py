"""The Transformer: a decoder language model or an encoder classifier, latent or packed.

The same module is used for training (only the collection `params`: latent weights, fake quantization) and for
inference (with the collection `packed`: packed weights, integer kernels). State is explicit: a call takes a `Cache`
and returns the updated one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bitnet_jax.models.stacked import equal_layers, layer_precisions, run_name
from bitnet_jax.nn.attention import Attention
from bitnet_jax.nn.config import TransformerShape
from bitnet_jax.nn.context import split_sequence
from bitnet_jax.nn.embedding import Embedding
from bitnet_jax.nn.head import next_token_logits
from bitnet_jax.nn.kv_cache import KVCache, write_at
from bitnet_jax.nn.linear import KEPT_CODES, KEPT_SCALES, BitLinear
from bitnet_jax.nn.linear_attention import LinearState
from bitnet_jax.nn.mlp import MLP
from bitnet_jax.nn.norms import block_norm
from bitnet_jax.nn.placement import split_over_tokens
from bitnet_jax.quantization.precision import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(TransformerShape):
    """The config of a Transformer; see TransformerShape for its fields."""

    def module(self) -> nn.Module:
        return Transformer(self)


@flax.struct.dataclass
class Cache:
    """The state of generation. S is the number of positions allocated, `length` the number written: a scalar for all
    rows, or [B]. Positions from `length` on are not valid and are overwritten by the next tokens.

    With `rows`, the layers hold more rows than B, and these are the ones that the B sequences have: softmax attention
    only."""

    layers: tuple[KVCache | LinearState, ...]
    valid: Bool[Array, "B S"]  # True where a real token (not padding) was written
    length: Int[Array, "*rows"]
    rows: Int[Array, "B"] | None = None


@flax.struct.dataclass
class Output:
    # float32; [B, C] for a classifier; with pooling unit vectors [B, D] in place of logits
    logits: Float[Array, "B T V"] | Float[Array, "B C"]
    hidden: Float[Array, "B *T D"]  # after the final norm: the input of the head; [B, D] without positions
    cache: Cache | None = None


class Block(nn.Module):
    """Attention and MLP, each on a residual branch."""

    config: ModelConfig
    precisions: dict[str, Precision]  # "attention/q_proj", ..., "mlp/down_proj"
    deterministic: bool
    rotary: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        visible: Bool[Array, "B T S"],
        key_mask: Bool[Array, "B T"],
        cache: KVCache | LinearState | None,
        length: Int[Array, "*rows"] | None,
        rows: Int[Array, "B"] | None = None,
        progress: Float[Array, ""] | float,
    ) -> tuple[Float[Array, "B T D"], KVCache | LinearState | None]:
        config = self.config
        attention = Attention(config, self._of("attention"), self.rotary, name="attention")
        mlp = MLP(config, self._of("mlp"), name="mlp")
        dropout = nn.Dropout(config.dropout, deterministic=self.deterministic)
        pre, post = config.norm_placement in ("sub", "pre"), config.norm_placement == "post"

        y = block_norm(config, "attention_norm")(x) if pre else x
        y, cache = attention(
            y,
            positions=positions,
            visible=visible,
            key_mask=key_mask,
            cache=cache,
            length=length,
            rows=rows,
            progress=progress,
        )
        x = x + dropout(y)
        if post:
            x = block_norm(config, "attention_norm")(x)
        y = block_norm(config, "mlp_norm")(x) if pre else x
        x = x + dropout(mlp(y, progress))
        return block_norm(config, "mlp_norm")(x) if post else x, cache

    def _of(self, part: str) -> dict[str, Precision]:
        return {
            path.removeprefix(part + "/"): precision
            for path, precision in self.precisions.items()
            if path.startswith(part + "/")
        }


def blocks(
    module: nn.Module,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    visible: Bool[Array, "B T S"],
    key_mask: Bool[Array, "B T"],
    cache: Cache | None,
    progress: Float[Array, ""] | float,
    deterministic: bool,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """All blocks and the final norm, which "post" has no more, as submodules of `module`; also returns the new cache of
    each block.

    Blocks of one kind are traced once, not one by one, in generation, where that would take most of the time to the
    first token, and where the parameters of equal layers are stacked (models/stacked.py): those blocks are a scan.
    """
    variables: Mapping[str, Any] = {} if module.is_initializing() else module.variables
    runs, precisions = equal_layers(config), layer_precisions(config)
    stacked = variables.get("params", {}).keys() & {run_name(run) for run in runs if len(run) > 1}
    call = {"positions": positions, "visible": visible, "key_mask": key_mask, "progress": progress}
    traced: dict[Hashable, Callable[..., Any]] = {}
    layers: list[Any] = []
    for run in runs:
        of_block, rotary = precisions[run[0]], run[0] not in config.no_rope_layers
        if run_name(run) in stacked:
            block = Block(config, of_block, deterministic, rotary, parent=None)
            x = _scanned(module, block, variables["params"][run_name(run)], x, call)
            layers += [None] * len(run)
            continue
        for i in run:
            if cache is None or not variables:
                kind = nn.remat(Block, policy=_kept(config)) if config.remat and cache is None else Block
                apply: Callable[..., Any] = kind(config, of_block, deterministic, rotary, name=f"layers_{i}")
            else:
                block = Block(config, of_block, deterministic, rotary, parent=None)
                apply = functools.partial(
                    traced.setdefault((*of_block.items(), rotary), jax.jit(block.apply)),
                    {name: part[f"layers_{i}"] for name, part in variables.items() if f"layers_{i}" in part},
                )
            x, layer_cache = apply(
                x,
                **call,
                cache=None if cache is None else cache.layers[i],
                length=None if cache is None else cache.length,
                rows=None if cache is None else cache.rows,
            )
            x = split_over_tokens(x)
            layers.append(layer_cache)
    return x if config.norm_placement == "post" else block_norm(config, "final_norm")(x), tuple(layers)


def _kept(config: ModelConfig) -> Callable[..., bool] | None:
    """The policy of jax.checkpoint for a block; None keeps nothing but its input."""
    if config.remat != "codes":
        return None
    return jax.checkpoint_policies.save_only_these_names(KEPT_CODES, KEPT_SCALES)


def _scanned(
    module: nn.Module, block: Block, params: PyTree, x: Float[Array, "B T D"], call: Mapping[str, Any]
) -> Float[Array, "B T D"]:
    """Equal blocks in turn, whose parameters are stacked. Random numbers differ from those of unstacked blocks."""
    layers = jax.tree.leaves(params)[0].shape[0]
    keys = {
        name: jax.random.split(module.make_rng(name), layers)
        for name in ("dropout", "stochastic")
        if module.has_rng(name)
    }

    def one(x: Array, layer: tuple[PyTree, dict[str, Array]]) -> tuple[Array, None]:
        params, rngs = layer
        y, _ = block.apply({"params": params}, x, **call, cache=None, length=None, rngs=rngs)
        return split_over_tokens(y), None

    if block.config.remat:
        # The scan keeps both passes apart, so they need no barriers against common subexpressions.
        one = jax.checkpoint(one, prevent_cse=False, policy=_kept(block.config))
    return jax.lax.scan(one, x, (params, keys))[0]


def classify(
    config: ModelConfig,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B T"],
    progress: Float[Array, ""] | float,
) -> Float[Array, "B C"]:
    """Logits of the linear layer `classifier` of the calling module, from the mean of the unmasked positions."""
    head = BitLinear.of(config, config.num_classes, config.precisions()["classifier"], "classifier")
    return head(masked_mean(x, mask), progress).astype(jnp.float32)


def masked_mean(x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """The mean over the unmasked positions; 0 if there are none."""
    weights = mask.astype(x.dtype)[..., None]
    return jnp.sum(x * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)


def unit_vectors(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """x / max(|x|, 1e-12) in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)), 1e-12)


class Transformer(nn.Module):
    """See the module docstring. Parameter paths are those of `ModelConfig.linear_shapes`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        progress: Float[Array, ""] | float = 1.0,
        deterministic: bool = True,
        read: Int[Array, "B"] | None = None,
    ) -> Output:
        """Logits for every position, class logits, or with pooling unit vectors.

        Args:
          tokens: ids in [0, vocab_size).
          positions: of the tokens; default: real tokens counted from 0, so left padding does not shift them.
          mask: True for real tokens, False for padding; default all real.
          segments: the document of each token; a token attends within its own only. Without a cache, and not with
            causal linear attention, whose state covers all earlier tokens. Default: one document in a row.
          cache: continue after its contents; the caller must make sure that the tokens fit.
          progress: fraction of training done, in [0, 1]; only used by annealed gradient estimators.
          deterministic: False enables dropout (needs an rng named "dropout").
          read: return logits and hidden of a language model for this token of each row only (T = 1 in the output).
        """
        config, (B, T) = self.config, tokens.shape
        if mask is None:
            mask = jnp.ones((B, T), bool)
        length = jnp.zeros((), jnp.int32) if cache is None else cache.length
        valid = mask if cache is None else write_at(cache.valid, mask, length)
        if positions is None:
            before = 0 if cache is None else jnp.sum(cache.valid, axis=1, keepdims=True, dtype=jnp.int32)
            positions = jnp.maximum(before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        visible = jnp.broadcast_to(valid[:, None, :], (B, T, valid.shape[1]))
        if config.causal:
            query = jnp.reshape(length, (-1, 1)) + jnp.arange(T, dtype=jnp.int32)[None]  # [1 or B, T]
            key = jnp.arange(valid.shape[1], dtype=jnp.int32)
            visible = visible & (key[None, None, :] <= query[:, :, None])
            if config.sliding_window is not None:
                # Distances count real tokens, so padding anywhere in a row does not narrow the window.
                rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
                own = jnp.take_along_axis(rank, jnp.broadcast_to(query, (B, T)), axis=1)
                visible = visible & (own[:, :, None] - rank[:, None, :] < config.sliding_window)

        if segments is not None:
            if cache is not None or (config.attention == "linear" and config.causal):
                raise ValueError("got segments with a cache or causal linear attention; expected neither")
            visible = visible & (segments[:, :, None] == segments[:, None, :])

        embed = Embedding.of(config, config.vocab_size, "embed")
        tokens, positions, visible = map(split_sequence, (tokens, positions, visible))
        x = embed(tokens)
        if config.position == "learned":
            x = x + Embedding.of(config, config.max_length, "position_embed")(positions)
        if config.norm_placement == "post":
            x = block_norm(config, "embed_norm")(x)
        x = split_over_tokens(nn.Dropout(config.dropout, deterministic=deterministic)(x))

        x, layers = blocks(
            self,
            config,
            x,
            positions=positions,
            visible=visible,
            key_mask=mask,
            cache=cache,
            progress=progress,
            deterministic=deterministic,
        )
        if config.num_classes:
            return Output(classify(config, x, mask, progress), x)
        if config.pooling == "mean":
            return Output(unit_vectors(masked_mean(x, mask)), x)
        if read is not None:
            x = jnp.take_along_axis(x, read[:, None, None], axis=1)
        logits = next_token_logits(config, embed, x, progress)
        if cache is not None:
            cache = Cache(layers, valid, length + T, cache.rows)
        return Output(logits, x, cache)


class LanguageHead(nn.Module):
    """The output head of a Transformer alone: logits of its final hidden states, with its parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B T D"], progress: Float[Array, ""] | float = 1.0
    ) -> Float[Array, "B T V"]:
        embed = Embedding.of(self.config, self.config.vocab_size, "embed")
        return next_token_logits(self.config, embed, hidden, progress)
