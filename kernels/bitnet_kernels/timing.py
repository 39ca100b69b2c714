"""How things are timed here: in turn, so that ratios hold while the machine drifts; medians with their spread."""

from __future__ import annotations

import functools
import math
import os
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
    """Seconds of one thing over the rounds."""

    median: float
    p10: float
    p90: float

    def __truediv__(self, parts: float) -> Spread:
        return Spread(*(value / parts for value in self))


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interleaved(
    calls: Mapping[Name, Callable[[int], Any]],
    budget: float = 0.0,
    *,
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS),
    warmup: int = 2,
    settle: bool = False,
) -> dict[Name, Spread]:
    """Times call(round) of each thing in turn, round after round.

    On a shared machine the speed of memory moves by half within seconds; what is timed in turn sees the same
    machine, and its ratios can be trusted.

    Args:
      budget: seconds for each thing on average.
      rounds: how many there are at least and at most, whatever the budget.
      warmup: rounds that come first and are not counted (compilation, first touch of memory).
      settle: call each thing once more, not counted, right before it is timed: for some milliseconds after another
        program, its threads still stand in the way of those of this one.
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
    """A call(round) that runs `length` products, each waiting for the one before, inside one compiled program.

    The weights are taken in turn, over the rounds as well; the first of a round follows the last of another.

    Args:
      repeats: how often a call goes through its `length` weights.
    """

    structure = jax.tree.structure(weights[0])

    @jax.jit
    def run(x: jax.Array, weights: Sequence[Sequence[jax.Array]]) -> jax.Array:
        def link(y: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
            never = y[0, 0].astype(jnp.float32) == math.pi  # but this product has to wait for y
            # Of the first x each time: out of the last one, XLA would compute all of the chain again in every link.
            return product(jnp.where(never, jnp.zeros_like(x), x), jax.tree.unflatten(structure, leaves))

        def once(_: Any, y: jax.Array) -> jax.Array:
            return functools.reduce(link, weights, y)

        first = jax.eval_shape(product, x, jax.tree.unflatten(structure, weights[0]))
        return jax.lax.fori_loop(0, repeats, once, jnp.zeros(first.shape, first.dtype))

    # Plain arrays: to take hundreds of packed ones apart, call for call, takes a millisecond.
    leaves = [jax.tree.leaves(w) for w in weights]
    links = [
        tuple(leaves[(i + j) % len(weights)] for j in range(length)) for i in range(0, len(weights), length)
    ]
    return lambda round: jax.block_until_ready(run(x, links[round % len(links)]))


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's product of float32, bfloat16 (summed in float32) or int8 (summed in int32)."""
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=wide)
