"""Batches of texts by length bucket, so that few shapes are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from bitnet_jax.progress import progress_bar

SMALLEST_WIDTH = 32
BATCH_TOKENS = 2**12  # maximum tokens per batch


class Batch(NamedTuple):
    """Indices of texts to pad to `width` tokens; the last batch of a width may have fewer texts than `rows`."""

    texts: np.ndarray  # int [n], n <= rows: indices into the sizes
    rows: int
    width: int


def widths(longest: int) -> list[int]:
    """Powers of two times SMALLEST_WIDTH below `longest`, then `longest`."""
    doublings = [SMALLEST_WIDTH << i for i in range(32)]
    return [width for width in doublings if width < longest] + [longest]


def batches(
    sizes: np.ndarray, longest: int, rows_of: Callable[[int], int], *, progress: bool = False
) -> Iterator[Batch]:
    """All texts, each once, in order of increasing width; the progress bar counts texts.

    Args:
      sizes: tokens of each text, int [N], from 1 to `longest`.
      rows_of: width -> rows of a batch; values below 1 count as 1.
    """
    below = 0
    with progress_bar(len(sizes), unit="text", show=progress) as bar:
        for width in widths(longest):
            of_width, rows = np.flatnonzero((sizes > below) & (sizes <= width)), max(1, rows_of(width))
            below = width
            for first in range(0, len(of_width), rows):
                texts = of_width[first : first + rows]
                yield Batch(texts, rows, width)
                bar.update(len(texts))
