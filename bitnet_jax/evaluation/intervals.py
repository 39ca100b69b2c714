"""95% confidence intervals of metrics over the evaluated examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 1000


class Estimate(NamedTuple):
    """A value and its confidence interval, which covers the sampling of examples only (not training, not prompts)."""

    value: float
    low: float
    high: float


def proportion(successes: int, count: int, level: float = LEVEL) -> Estimate:
    """Proportion of successes with the Wilson (1927) score interval, which is accurate near 0 and 1 too.

    centre = (p + z^2 / 2n) / (1 + z^2 / n),   half width = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"got {successes} successes of {count}, expected 0 to count, count at least 1")
    p, z = successes / count, NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z * z / count
    centre = (p + z * z / (2 * count)) / scale
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / scale
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, level: float = LEVEL) -> Estimate:
    """The statistic of all examples, with the percentile interval over RESAMPLES resamples with replacement.

    statistic: a function of int indices [count] of examples. The resamples are the same in every call.
    """
    draw = np.random.default_rng(0)
    values = [statistic(draw.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(np.arange(count))), float(low), float(high))


def mean(values: np.ndarray, level: float = LEVEL) -> Estimate:
    """The mean of values [count], by bootstrap."""
    return bootstrap(lambda indices: float(values[indices].mean()), len(values), level)


def mean_of_proportions(successes: np.ndarray, counts: np.ndarray, level: float = LEVEL) -> Estimate:
    """The unweighted mean of successes / counts over groups, with the normal interval.

    Its variance is the mean over groups of q (1 - q) / count, divided by the number of groups. q = (successes + 1) /
    (count + 2) is Laplace's estimate, so that a group whose few trials all succeeded does not have variance 0.
    """
    q = (successes + 1) / (counts + 2)
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(np.sum(q * (1 - q) / counts)) / len(counts)
    value = float(np.mean(successes / counts))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))
