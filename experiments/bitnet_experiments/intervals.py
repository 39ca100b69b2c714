"""What a handful of seeds can say: Student-t intervals, paired differences, and what would have been seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats


class Interval(NamedTuple):
    """Mean and half width of the 95 % Student-t interval over values; one value has none, half is NaN."""

    mean: float
    half: float

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:.4f} (one seed)"
        return f"{self.mean:.4f} ± {self.half:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """half = t(0.975, n - 1) s / sqrt(n). Raises ValueError: no values."""
    if not values:
        raise ValueError("got no values, expected at least one")
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, math.nan)
    return Interval(mean, float(scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values)))


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """values - base for every seed that both have: what the seed does to both drops out."""
    return [values[seed] - base[seed] for seed in values if seed in base]


def detectable(differences: Sequence[float], power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true mean difference that a two-sided paired t-test would have found with this power.

    Solves P(|T| > t(1 - level / 2, n - 1)) = power for the noncentrality d sqrt(n) / s of T, with the spread
    s of these differences taken as the true one. NaN below two differences.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    critical = scipy.stats.t.ppf(1 - level / 2, n - 1)

    def missing(noncentrality: float) -> float:
        # A significant difference of the wrong sign is left out: at such powers it has no weight.
        return float(scipy.stats.nct.sf(critical, n - 1, noncentrality)) - power

    # With two differences the answer is about 16, with more it is less; scipy's tails are NaN far beyond.
    noncentrality = scipy.optimize.brentq(missing, 0.0, 40.0)
    return float(noncentrality * np.std(differences, ddof=1) / math.sqrt(n))
