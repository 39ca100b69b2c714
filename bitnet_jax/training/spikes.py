"""Loss spikes: when an update counts as one, and the return to the last checkpoint that follows.

The rule is Hampel's identifier, from above only: with m the median of the last `window` losses and MAD the median of
their distances from m, a loss above

    m + factor * 1.4826 * MAD

is a spike. 1.4826 MAD estimates the standard deviation of normally distributed losses and, unlike that, does not grow
with the spikes themselves (Davies and Gather 1993). Before `window` losses are known there are no spikes; NaN, infinity
and a loss above training.max_loss count always.

What follows is PaLM's remedy (2204.02311, section 5.1): the run goes back to the newest checkpoint and skips the
batches from there on, the one with the spike included. Training is deterministic: they would lead to it again.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_jax.training.config_sections import TrainingConfig

NORMAL = 1.4826  # standard deviation / MAD of a normal distribution


class Spikes:
    """The losses that the next one is compared with, and the returns so far; both are part of a checkpoint's meta.

    Args:
      saved: `state()` of the checkpoint that the run resumes from; None: it starts from scratch.
    """

    def __init__(self, training: TrainingConfig, saved: Mapping[str, Any] | None = None):
        self.factor, self.most = training.spike_factor, training.max_returns
        self.losses: deque[float] = deque((saved or {}).get("losses", ()), maxlen=training.spike_window)
        self.returns: list[dict[str, Any]] = list((saved or {}).get("returns", ()))

    def limit(self) -> float | None:
        """The largest loss that is no spike; None: any is allowed so far."""
        if self.factor is None or len(self.losses) < (self.losses.maxlen or 0):
            return None
        middle = statistics.median(self.losses)
        return middle + self.factor * NORMAL * statistics.median(abs(loss - middle) for loss in self.losses)

    def add(self, loss: float) -> None:
        """A loss that is no spike."""
        if self.factor is not None:
            self.losses.append(loss)

    def may_return(self) -> bool:
        return len(self.returns) < self.most

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "returns": self.returns}

    def position(self, step: int) -> int:
        """Of the batch of the update after `step` updates, among all batches."""
        return batch_position(step, [tuple(item["skipped"]) for item in self.returns])

    def go_back(self, spike: int, to: int, message: str, saved: Mapping[str, Any] | None) -> None:
        """Record that the update that led to step `spike` was a spike, and the return to step `to`.

        Args:
          saved: `state()` of the checkpoint at `to`; None: the initial weights.
        """
        returns = list((saved or {}).get("returns", ()))
        self.returns = returns + [item for item in self.returns[len(returns) :] if item["to"] == to]
        skipped = [self.position(to), self.position(spike - 1)]
        self.returns.append({"from": spike, "to": to, "skipped": skipped, "message": message})
        self.losses = deque((saved or {}).get("losses", ()), maxlen=self.losses.maxlen)


def batch_position(step: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The position of the batch after `step` others if those in `skipped` are left out.

    Args:
      skipped: first and last position of each gap, ascending.
    """
    position = step
    for first, last in skipped:
        if position >= first:
            position += last - first + 1
    return position
