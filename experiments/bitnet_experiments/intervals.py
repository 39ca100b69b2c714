"""Statistics over a few seeds: Student-t intervals, paired differences, and detectable differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats


class Interval(NamedTuple):
    """Mean and half-width of the 95 % Student-t interval; the half-width of a single value is NaN."""

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
    """values - base for every common seed, which cancels effects of the seed on both."""
    return [values[seed] - base[seed] for seed in values if seed in base]


def detectable(differences: Sequence[float], power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true mean difference that a two-sided paired t-test would have found with this power.

    Solves P(|T| > t(1 - level / 2, n - 1)) = power for the noncentrality d sqrt(n) / s of T, taking the sample
    deviation s of these differences as the true one. NaN for fewer than two differences.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    critical = scipy.stats.t.ppf(1 - level / 2, n - 1)

    def missing(noncentrality: float) -> float:
        # Significant differences of the wrong sign are ignored: negligible at such powers.
        return float(scipy.stats.nct.sf(critical, n - 1, noncentrality)) - power

    # About 16 for two differences, and less for more; scipy's tails are NaN for much larger values.
    noncentrality = scipy.optimize.brentq(missing, 0.0, 40.0)
    return float(noncentrality * np.std(differences, ddof=1) / math.sqrt(n))
