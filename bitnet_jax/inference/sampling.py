"""Sampling: filters as pure functions on logits [B, V], and the choice of the next token.

A filter returns logits of the same shape with removed tokens set to -inf; at least one token always remains.
`next_token` applies them in this order:

    repetition penalty -> top-k -> temperature -> top-p -> min-p -> one draw per row

Other libraries apply the temperature before top-k, which keeps the same k tokens up to rounding (dividing by the
temperature may make two logits equal). With top-k first, only the k largest logits are needed.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

MIN_TEMPERATURE = 1e-5  # dividing float32 logits by less may overflow all of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. The default is greedy; None or the neutral value disables a filter.

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = (
        0.0  # 0: greedy, top_k, top_p and min_p then have no effect; 1: the model's distribution
    )
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the most likely one
    repetition_penalty: float = 1.0  # > 1 makes tokens of the prompt and the text so far less likely

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            off = value is None and field.name == "top_k"
            if not off and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{field.name}: got {value!r}, expected a number")
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            raise ValueError(
                f"temperature: got {self.temperature}, expected 0 (greedy) or at least {MIN_TEMPERATURE}"
            )
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k: got {self.top_k}, expected an integer of at least 1, or None for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected more than 0 and at most 1 (1 keeps all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: got {self.min_p}, expected between 0 (keeps all) and 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty: got {self.repetition_penalty}, expected a positive number (1 is off)"
            )

    def filters(self) -> Filters:
        """The enabled filters."""

        def number(value: float, off: float) -> np.float32 | None:
            # Clipped so that neither the number nor its reciprocal, which XLA may multiply by, is flushed to zero.
            tiny = np.finfo(np.float32).tiny
            return None if value == off else np.float32(np.clip(value, tiny, 0.5 / tiny))

        penalty = number(self.repetition_penalty, off=1.0)
        if self.temperature == 0:
            return Filters(None, None, None, None, penalty)
        return Filters(
            number(self.temperature, off=0.0),
            self.top_k,
            number(self.top_p, off=1.0),
            number(self.min_p, off=0.0),
            penalty,
        )


Number = np.float32 | Float[Array, ""]


@flax.struct.dataclass
class Filters:
    """A SamplingConfig as an argument of jitted functions; None: that filter is off (temperature: greedy).

    A program is compiled for a set of enabled filters and a value of top_k; the other values are traced.
    """

    temperature: Number | None
    top_k: int | None = flax.struct.field(pytree_node=False)
    top_p: Number | None
    min_p: Number | None
    repetition_penalty: Number | None


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Number
) -> Float[Array, "B V"]:
    """Logits of seen tokens: `l / penalty` where l > 0, `l * penalty` elsewhere (CTRL, 1909.05858).

    Finite logits stay finite for any penalty: infinite ones would not define a distribution.
    """
    limits = jnp.finfo(logits.dtype)
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    penalized = jnp.where(jnp.isfinite(logits), jnp.clip(penalized, limits.min, limits.max), logits)
    return jnp.where(seen, penalized, logits)


def apply_temperature(logits: Float[Array, "B V"], temperature: float | Number) -> Float[Array, "B V"]:
    """`(l - max l) / temperature`: the softmax of `l / temperature`, without overflow at low temperatures."""
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """The k largest logits; ties keep the lower ids, so that k = 1 is greedy."""
    B, V = logits.shape
    _, kept = jax.lax.top_k(logits, min(k, V))
    keep = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], kept].set(True)
    return jnp.where(keep, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: float | Number) -> Float[Array, "B V"]:
    """The smallest set of most likely tokens with total probability at least p (nucleus sampling, 1904.09751); of equal
    logits, those of the lower ids.

    By bisection, first over the values of logits and then over the ids of tokens at the limit: sorting a whole
    vocabulary is slow on CPUs.
    """
    B, V = logits.shape
    values = logits.astype(jnp.float32)
    probability = jax.nn.softmax(values, axis=-1)
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0, values), jnp.int32)  # one zero, not two
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the values
    ids = jnp.arange(V, dtype=jnp.int32)[None]

    def total(chosen: Bool[Array, "B V"]) -> Float[Array, "B 1"]:
        # In 64 lanes, which XLA vectorizes on CPUs.
        lanes = jnp.pad(jnp.where(chosen, probability, 0), ((0, 0), (0, -V % 64))).reshape(B, -1, 64)
        return jnp.sum(jnp.sum(lanes, axis=1), axis=-1, keepdims=True)

    def halfway(low: Int[Array, "B 1"], high: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        return (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow

    def lower_limit(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = halfway(*bounds)
        too_low = total(order > middle) >= p
        return jnp.where(too_low, middle, bounds[0]), jnp.where(too_low, bounds[1], middle)

    # The lowest value such that all tokens above it together do not reach p.
    ends = (jnp.full((B, 1), end, jnp.int32) for end in (-(2**31), 2**31 - 1))
    limit = jax.lax.fori_loop(0, 32, lower_limit, tuple(ends))[1]
    above, at_limit = order > limit, order == limit

    def last_id(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = halfway(*bounds)
        kept = total(above | (at_limit & (ids < middle))) < p
        return jnp.where(kept, middle, bounds[0]), jnp.where(kept, bounds[1], middle)

    # The highest id such that the tokens before it do not reach p.
    ends = (jnp.full((B, 1), end, jnp.int32) for end in (0, V))
    last = jax.lax.fori_loop(0, V.bit_length(), last_id, tuple(ends))[0]
    return jnp.where(above | (at_limit & (ids <= last)) | jnp.isnan(logits), logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "B V"], p: float | Number) -> Float[Array, "B V"]:
    """Tokens with probability at least `p * max probability` (2407.01082)."""
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)


def filtered_logits(
    logits: Float[Array, "B V"], filters: Filters, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """The logits of the distribution that `next_token` samples from; greedy takes their argmax.

    Args:
      seen: tokens of the prompt and the text so far; required with a repetition penalty.
    """
    if filters.repetition_penalty is not None:
        if seen is None:
            raise ValueError("repetition_penalty is not 1, but no `seen` tokens are given")
        logits = penalize_repetition(logits, seen, filters.repetition_penalty)
    if filters.temperature is None:
        return logits
    if filters.top_k is not None:
        logits = keep_top_k(logits, filters.top_k)
    logits = apply_temperature(logits, filters.temperature)
    if filters.top_p is not None:
        logits = keep_top_p(logits, filters.top_p)
    if filters.min_p is not None:
        logits = keep_min_p(logits, filters.min_p)
    return logits


def most_likely(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax(logits)`: the lowest id of equal logits, the first NaN if any.

    In two passes, which XLA vectorizes on CPUs; it does not vectorize argmax."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where((logits == largest) | jnp.isnan(logits), ids[None], ids.size), axis=-1)


def draw(logits: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The token of each row at which the cumulative distribution `softmax(logits)` passes `uniform`, in [0, 1).

    One random number per row; `jax.random.categorical` draws one per token of the vocabulary, which is slow on CPUs.
    """
    block = 64  # of tokens, of which one is looked for in each row
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -logits.shape[1] % block))).reshape(logits.shape[0], -1, block)
    ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    total = ends[:, -1:]
    wanted = jnp.minimum(uniform[:, None] * total, jnp.nextafter(total, jnp.zeros_like(total)))
    found = jnp.sum(ends <= wanted, axis=-1, keepdims=True, dtype=jnp.int32)
    inside = jnp.take_along_axis(blocks, found[:, :, None], axis=1)[:, 0]
    begin = jnp.take_along_axis(jnp.pad(ends, ((0, 0), (1, 0))), found, axis=1)
    before = begin + jnp.pad(jnp.cumsum(inside, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    # The last token that can be drawn and does not begin behind it: sums may be rounded either way.
    places = jnp.where((inside > 0) & (before <= wanted), jnp.arange(block, dtype=jnp.int32), 0)
    return found[:, 0] * block + jnp.max(places, axis=-1)


def next_token(
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
    filters: Filters,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """One token per row. Each row has its own key, so its draw does not depend on the batch size."""
    logits = filtered_logits(logits.astype(jnp.float32), filters, seen)
    if filters.temperature is None:
        return most_likely(logits)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits.shape[0]))
    return draw(logits, jax.vmap(lambda row: jax.random.uniform(row, dtype=jnp.float32))(row_keys))
