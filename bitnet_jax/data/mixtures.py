"""Batches from several token streams with weights.

The rows of all batches form one infinite sequence, in cycles of CYCLE. In each cycle every stream has its share of the
rows, rounded to whole rows by the largest remainder, in an order that raw Philox words of (seed, cycle) give. The
windows of a stream follow each other in its sequence of shuffled epochs, wherever its rows are. So a batch depends only
on its step, every window of a stream occurs once in each of its epochs, and every cycle has the weights asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_jax.data.batches import EVERY_ROW, TokenBatches, random_words, token_batch, window_positions
from bitnet_jax.data.errors import DataError

CYCLE = 4096
CYCLE_COUNTER = 1 << 63  # so that these words are not those of an epoch or a step


def shares(weights: Sequence[float]) -> list[int]:
    """Rows of each stream in a cycle. Raises DataError: a weight that is not positive, or too small for a row."""
    if not weights or min(weights) <= 0:
        raise DataError(f"mixture: got the weights {list(weights)}, expected positive numbers")
    exact = [weight / sum(weights) * CYCLE for weight in weights]
    rows = [int(share) for share in exact]
    by_remainder = sorted(range(len(rows)), key=lambda k: (rows[k] - exact[k], k))
    for k in by_remainder[: CYCLE - sum(rows)]:
        rows[k] += 1
    if min(rows) < 1:
        raise DataError(
            f"mixture: got a weight of {min(weights) / sum(weights):.2g} of the whole, expected at least 1 of {CYCLE} "
            "rows; raise or remove it"
        )
    return rows


@dataclass(frozen=True, eq=False)
class MixedBatches:
    """`batch(step)` as of TokenBatches. The streams have the same length T, batch size B, seed and separator."""

    streams: Sequence[TokenBatches]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if any(stream.sampling == "windows" for stream in self.streams):
            raise DataError(
                "mixture: got sampling 'windows', expected epoch or shuffle; change data.sampling"
            )
        shares(self.weights)

    def batch(self, step: int, rows: slice = EVERY_ROW) -> dict[str, np.ndarray]:
        first = self.streams[0]
        places = np.arange(step * first.batch_size, (step + 1) * first.batch_size)[rows]
        chosen, window = self._rows(places)
        windows = np.zeros((len(places), first.length + 1), np.int32)
        for k, stream in enumerate(self.streams):
            own = chosen == k
            starts = stream.window_starts(window[own].tolist())
            windows[own] = stream.tokens[window_positions(starts, first.length)]
        return token_batch(windows, first.separator)

    def _rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row: its stream, and its place in the sequence of that stream, int64 [n]."""
        cycles, slots = np.divmod(places, CYCLE)
        orders = {cycle: self._order(cycle) for cycle in np.unique(cycles).tolist()}
        chosen, before = (
            np.array(
                [orders[c][part][s] for c, s in zip(cycles.tolist(), slots.tolist(), strict=True)], np.int64
            )
            for part in (0, 1)
        )
        return chosen, cycles * np.array(shares(self.weights))[chosen] + before

    @functools.cached_property
    def _order(self) -> functools._lru_cache_wrapper[tuple[np.ndarray, np.ndarray]]:
        seed, rows = self.streams[0].seed, shares(self.weights)

        @functools.lru_cache(maxsize=2)
        def order(cycle: int) -> tuple[np.ndarray, np.ndarray]:
            """The stream of each row of a cycle, and how many rows of that stream are before it."""
            words = random_words(seed, CYCLE_COUNTER + cycle, CYCLE)
            chosen = np.repeat(np.arange(len(rows)), rows)[np.argsort(words, kind="stable")]
            before = np.zeros(CYCLE, np.int64)
            for k, count in enumerate(rows):
                before[chosen == k] = np.arange(count)
            return chosen, before

        return order
