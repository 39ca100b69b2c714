"""Interleaved timing, so that ratios are valid while machine speed drifts; medians with percentiles."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Product = Callable[[jax.Array, Any], jax.Array]
Name = TypeVar("Name")
MIN_ROUNDS, MAX_ROUNDS = 3, 1000


class Spread(NamedTuple):
    """Seconds per call over the rounds."""

    median: float
    p10: float
    p90: float

    def __truediv__(self, parts: float) -> Spread:
        return Spread(*(value / parts for value in self))


def interleaved(
    calls: Mapping[Name, Callable[[int], Any]],
    budget: float = 0.0,
    *,
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS),
    warmup: int = 2,
    settle: bool = False,
) -> dict[Name, Spread]:
    """Times all calls(round) in interleaved rounds.

    On a shared machine memory speed varies by half within seconds; interleaved calls run under the same conditions,
    so their ratios are reliable.

    Args:
      budget: seconds per call on average.
      rounds: minimum and maximum number of rounds, regardless of the budget.
      warmup: initial rounds that are not counted (compilation, first touch of memory).
      settle: make an extra, uncounted call right before each timed one: threads of the previous program still compete
        for some milliseconds.
    """
    for round in range(warmup):
        for call in calls.values():
            call(round)
    times: dict[Name, list[float]] = {name: [] for name in calls}
    began, done = time.perf_counter(), 0
    while done < rounds[0] or (done < rounds[1] and time.perf_counter() - began < budget * len(calls)):
        for name, call in calls.items():
            if settle:
                call(2 * done)
            start = time.perf_counter()
            call(2 * done + 1 if settle else done)
            times[name].append(time.perf_counter() - start)
        done += 1
    return {name: spread(values) for name, values in times.items()}


def spread(times: Sequence[float]) -> Spread:
    return Spread(*(float(value) for value in np.quantile(times, (0.5, 0.1, 0.9))))


def chain(
    product: Product, x: jax.Array, weights: Sequence[Any], length: int, repeats: int = 1
) -> Callable[[int], Any]:
    """A call(round) that runs `length` products in one compiled program, each dependent on the previous one.

    Weights are cycled across rounds: a round starts after the last weight of the previous round.

    Args:
      repeats: number of passes over the `length` weights per call.
    """

    structure = jax.tree.structure(weights[0])

    @jax.jit
    def run(x: jax.Array, weights: Sequence[Sequence[jax.Array]]) -> jax.Array:
        def link(y: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
            never = y[0, 0].astype(jnp.float32) == math.pi  # always False, but makes the product wait for y
            # Always from the original x: with the previous link's x, XLA would recompute the whole chain in each link.
            return product(jnp.where(never, jnp.zeros_like(x), x), jax.tree.unflatten(structure, leaves))

        def once(_: Any, y: jax.Array) -> jax.Array:
            return functools.reduce(link, weights, y)

        first = jax.eval_shape(product, x, jax.tree.unflatten(structure, weights[0]))
        return jax.lax.fori_loop(0, repeats, once, jnp.zeros(first.shape, first.dtype))

    # Plain arrays: flattening hundreds of packed ones in every call takes a millisecond.
    leaves = [jax.tree.leaves(w) for w in weights]
    links = [
        tuple(leaves[(i + j) % len(weights)] for j in range(length)) for i in range(0, len(weights), length)
    ]
    return lambda round: jax.block_until_ready(run(x, links[round % len(links)]))


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's product of float32, bfloat16 (summed in float32) or int8 (summed in int32)."""
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=wide)
