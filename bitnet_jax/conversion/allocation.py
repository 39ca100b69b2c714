"""Which option each layer takes, so that the sum of harms is least for the sum of bytes: a knapsack, solved exactly.

Every layer has one of several options, each with its bytes and its harm. Choices of the first layers are kept only if
no other choice of them has fewer bytes and no more harm, or less harm and no more bytes: whatever the layers after them
do, the one that was dropped could not win. So after the last layer all best choices are left, for every budget at once.
Their number is at most that of different sums of bytes, which is small as blocks have layers of equal shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Option(NamedTuple):
    bytes: int
    harm: float


class Choice(NamedTuple):
    bytes: int
    harm: float
    names: dict[str, str]  # layer -> the name of its option


class Frontier:
    """All choices of which none is better in bytes and in harm, ascending in bytes, so descending in harm.

    Raises:
      ValueError: no layers, a layer without options, or a harm that is NaN or infinite.
    """

    bytes: Int[np.ndarray, "P"]
    harm: Float[np.ndarray, "P"]

    def __init__(self, options: Mapping[str, Mapping[str, Option]]):
        """options: layer -> name of an option -> bytes and harm."""
        for layer, its in options.items():
            if not its or not all(np.isfinite(option.harm) for option in its.values()):
                raise ValueError(f"{layer}: got the options {dict(its)}, expected some, with finite harms")
        if not options:
            raise ValueError("got no layers, expected at least one to choose for")
        self._options = options
        self._taken: list[
            tuple[np.ndarray, np.ndarray]
        ] = []  # of each layer: (index before it, index of its option)
        self.bytes, self.harm = np.zeros(1, np.int64), np.zeros(1)
        for its in options.values():
            nbytes = np.add.outer(self.bytes, [option.bytes for option in its.values()]).reshape(-1)
            harm = np.add.outer(self.harm, [option.harm for option in its.values()]).reshape(-1)
            order = np.lexsort((harm, nbytes))
            least = np.minimum.accumulate(np.concatenate([[np.inf], harm[order][:-1]]))
            kept = order[harm[order] < least]
            self._taken.append((kept // len(its), kept % len(its)))
            self.bytes, self.harm = nbytes[kept], harm[kept]

    def choice(self, index: int) -> Choice:
        """One of the choices, by its index in `bytes` and `harm`."""
        nbytes, harm = int(self.bytes[index]), float(self.harm[index])
        names = {}
        for (layer, its), (before, option) in zip(
            reversed(list(self._options.items())), reversed(self._taken), strict=True
        ):
            names[layer] = list(its)[option[index]]
            index = int(before[index])
        return Choice(nbytes, harm, {layer: names[layer] for layer in self._options})

    def within_bytes(self, budget: int) -> Choice | None:
        """The choice of the least harm with at most `budget` bytes; None if all have more."""
        count = int(np.searchsorted(self.bytes, budget, side="right"))
        return self.choice(count - 1) if count else None

    def within_harm(self, most: float) -> Choice | None:
        """The choice of the fewest bytes with at most the harm `most`; None if all have more."""
        found = np.flatnonzero(self.harm <= most)
        return self.choice(int(found[0])) if len(found) else None
