"""Statistics of few seeds: estimates with intervals, tests of many and of no differences, detectable differences.

Everything here is Student's t: an estimate, its standard error, and the degrees of freedom of that error.
`bitnet_experiments.contrasts` says which error a comparison of arms has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

from bitnet_jax.evaluation.intervals import proportion


class Estimate(NamedTuple):
    """A mean or a difference, its standard error and the degrees of freedom; the error of a single value is NaN."""

    mean: float
    error: float
    df: float
    method: str = "Student"  # where the error comes from

    def half_width(self, level: float = 0.95) -> float:
        """t((1 + level) / 2, df) error; NaN if there is no error."""
        if math.isnan(self.error):
            return math.nan
        return float(scipy.stats.t.ppf((1 + level) / 2, self.df)) * self.error

    @property
    def half(self) -> float:
        """Half of the 95 % interval."""
        return self.half_width()

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def p(self) -> float:
        """Two-sided p-value of the mean being 0."""
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * scipy.stats.t.sf(abs(self.mean) / self.error, self.df))

    def within(self, margin: float, level: float = 0.05) -> bool:
        """Two one-sided tests: is |mean| below the margin, each side at `level`? NaN errors are never within."""
        return abs(self.mean) + self.half_width(1 - 2 * level) < margin

    def __str__(self) -> str:
        digits = 4 if abs(self.mean) < 1000 else 0
        if math.isnan(self.error):
            return f"{self.mean:,.{digits}f} (one seed)"
        return f"{self.mean:,.{digits}f} ± {self.half:,.{digits}f}"


def interval(values: Sequence[float]) -> Estimate:
    """error = s / sqrt(n), df = n - 1. Raises ValueError: no values."""
    if not values:
        raise ValueError("got no values, expected at least one")
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, math.nan, math.nan)
    return Estimate(mean, float(scipy.stats.sem(values)), n - 1)


def with_sampling(estimate: Estimate, variance: float) -> Estimate:
    """The estimate with the known variance of a finite test set added to that over seeds.

    error^2 = e^2 + variance; df = df (error^2 / e^2)^2, as Welch and Satterthwaite have it for a sum of which one term
    is known exactly.
    """
    if variance == 0 or math.isnan(estimate.error):
        return estimate
    if estimate.error == 0:
        return estimate._replace(error=math.sqrt(variance), df=math.inf)
    total = estimate.error**2 + variance
    return estimate._replace(error=math.sqrt(total), df=estimate.df * (total / estimate.error**2) ** 2)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """values - base for every common seed. It cancels what both share, such as one trained model measured twice."""
    return [values[seed] - base[seed] for seed in values if seed in base]


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's procedure rejects, so that any false rejection has at most this probability.

    The i-th smallest of n p-values (from 0) is rejected if it and all smaller ones are at most level / (n - i).
    """
    rejected = [False] * len(p_values)
    for i, place in enumerate(np.argsort(p_values)):
        if not p_values[place] <= level / (len(p_values) - i):
            break
        rejected[place] = True
    return rejected


def detectable(estimate: Estimate, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference that a two-sided t-test with this error would have found with this power.

    Solves P(|T| > t(1 - level / 2, df)) = power for the noncentrality of T, taking the error seen here as the true
    one. NaN without an error.
    """
    if math.isnan(estimate.error):
        return math.nan
    return _noncentrality(estimate.df, power, level) * estimate.error


@functools.lru_cache(maxsize=4096)
def _noncentrality(df: float, power: float, level: float) -> float:
    if df > 1e4:  # normal
        return float(scipy.stats.norm.ppf(1 - level / 2) + scipy.stats.norm.ppf(power))
    critical = scipy.stats.t.ppf(1 - level / 2, df)

    def missing(noncentrality: float) -> float:
        # Significant differences of the wrong sign are ignored: negligible at such powers.
        return float(scipy.stats.nct.sf(critical, df, noncentrality)) - power

    # About 16 for one degree of freedom, and less for more; scipy's tails are NaN for much larger values.
    return float(scipy.optimize.brentq(missing, 0.0, 40.0))


class Range(NamedTuple):
    """A difference with a 95 % interval that is not symmetric around it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


def proportions(successes: int, n: int, base: int, m: int) -> Range:
    """p - q for p = successes / n and q = base / m, with Newcombe's 95 % interval from Wilson's (l, u) and (L, U).

    lower = d - sqrt((p - l)^2 + (U - q)^2), upper = d + sqrt((u - p)^2 + (q - L)^2)
    """
    p, q = proportion(successes, n), proportion(base, m)
    d = p.value - q.value
    low = d - math.hypot(p.value - p.low, q.high - q.value)
    return Range(d, low, d + math.hypot(p.high - p.value, q.value - q.low))
