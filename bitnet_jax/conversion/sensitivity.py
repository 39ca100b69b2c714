"""The harm of few-bit weights in one linear layer alone, measured as a divergence of the model's predictions.

The harm of the grid g in the layer l is the mean over tokens, in nats, of

    KL(p || p_lg) = sum_v p_v ln(p_v / p_lg,v)

where p are the next-token probabilities of the float model, and p_lg those with the weights of l rounded to g as the
conversion rounds them (GPTQ on the calibration text). KL is what the whole conversion is judged by, so the only
assumption is that harms of several layers add. They do to second order: for small changes d of the logits KL is half of
d^T F d, F the Fisher matrix, and the products of the changes by different layers cancel on average if those are
independent. Large harms do not have to add, so the converted model is measured again.

Inputs of layers and tables are not rounded here, though the packed model rounds them: any change of a layer rounds all
inputs after it anew, and the sum over layers would count that many times. Their harm is measured once, for all.

An error of the output weighted by second moments, which GPTQ has at hand, would be cheaper by a forward pass for each
layer and grid, but does not say what an error in one layer is worth against one in another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax.conversion.blocks import Settings, finite_moment, matrix, rounded_layer, split
from bitnet_jax.conversion.calibration import Stream, Weights, after_block, embedded, stages
from bitnet_jax.conversion.gptq import inverse_factor, output_error
from bitnet_jax.models import ModelConfig
from bitnet_jax.models.transformer import LanguageHead
from bitnet_jax.nn.norms import block_norm


class Harm(NamedTuple):
    kl: float  # nats a token
    error: float  # of the output of the layer, relative to it, as in blocks.Report


@jax.jit
def divergence(p: Float[Array, "T V"], q: Float[Array, "T V"]) -> Float[Array, ""]:
    """Mean KL(softmax(p) || softmax(q)) in nats a token, of float32 logits.

    As both sum to 1, it is sum_v p_v (e^r - 1 - r) with r = ln(q_v / p_v): no term is below 0, so what is small is not
    the difference of sums that are large.
    """
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    r = log_q - log_p
    # Near 0, e^r - 1 - r would lose its digits; far below 0 the series would be wrong.
    small = jnp.square(r) * (1 / 2 + r / 6)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * jnp.where(jnp.abs(r) < 1e-2, small, jnp.expm1(r) - r), axis=-1))


class FloatBlock(NamedTuple):
    """The parameters of a block as the measurement uses them."""

    weights: dict[str, np.ndarray]  # float matrices by path, rotated if the settings say so
    others: dict[str, Any]

    @classmethod
    def of(cls, params: Mapping[str, Any], layer: int, settings: Settings) -> FloatBlock:
        """Raises ValueError: a matrix has NaN or infinity."""
        weights, others = split(params[f"layers_{layer}"])
        return cls(
            {path: matrix(f"layers_{layer}/{path}", w, settings.rotate) for path, w in weights.items()},
            others,
        )


class Probe:
    """The model with float weights, on the windows of text where harms are measured, before one block.

    In memory are its activations there and the logits that it ends with. Inputs of layers and tables are rounded, and
    inputs rotated, as the config says.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Any],
        blocks: Sequence[FloatBlock],
        tokens: Int[np.ndarray, "B T"],
    ):
        self.config, self.blocks = config, blocks
        self.ends = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
        self.x, self.layer = embedded(config, params, tokens), 0
        self.logits = self._logits(self.x, 0, {})

    def kl(self, changed: Weights) -> float:
        """Mean KL to the logits with float weights, if the block has these in place of some of its own."""
        changed_logits = self._logits(self.x, self.layer, changed)
        return float(np.mean([divergence(p, q) for p, q in zip(self.logits, changed_logits, strict=True)]))

    def advance(self) -> None:
        """To the next block."""
        weights, others = self.blocks[self.layer]
        self.x = np.asarray(after_block(self.config, self.layer, others, weights, self.x), np.float32)
        self.layer += 1

    def _logits(self, x: Any, start: int, changed: Weights) -> list[Float[Array, "T V"]]:
        for layer in range(start, len(self.blocks)):
            weights, others = self.blocks[layer]
            replaced = {**weights, **changed} if layer == start else weights
            x = after_block(self.config, layer, others, replaced, x)
        return [_head(self.config, self.ends, row) for row in x]


@functools.partial(jax.jit, static_argnums=0)
def _head(config: ModelConfig, params: Mapping[str, Any], x: Float[Array, "T D"]) -> Float[Array, "T V"]:
    hidden: Any = x[None]
    if config.norm_placement != "post":
        hidden = block_norm(config, "final_norm").apply({"params": params.get("final_norm", {})}, hidden)
    logits: Any = LanguageHead(config).apply({"params": params}, hidden)
    return logits[0]


def block_harms(
    probe: Probe, stream: Stream, settings: Mapping[str, Settings], done: Callable[[], None]
) -> dict[str, dict[str, Harm]]:
    """Path in the block -> name of the settings -> harm, of the block that the probe is at.

    Args:
      stream: the calibration text before the block, through blocks with float weights.
      settings: by name, those to compare, all calibrated and alike but for the grid.
      done: called after each measurement.

    Raises:
      ValueError: the calibration text has NaN.
    """
    layer = probe.layer
    weights, others = probe.blocks[layer]
    harms: dict[str, dict[str, Harm]] = {}
    for stage in stages(probe.config):
        moment = finite_moment(stream, layer, others, weights, stage[0])
        factor, _ = inverse_factor(moment)
        for path in stage:
            harms[path] = {}
            for name, one in settings.items():
                rounded = rounded_layer(weights[path], one, moment, factor).dequantized()
                error = output_error(weights[path], rounded, moment)
                harms[path][name] = Harm(probe.kl({path: rounded}), error)
                done()
    return harms
