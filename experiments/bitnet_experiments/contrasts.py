"""Differences between arms: one additive model of a study's runs, and what to use where it does not hold.

    metric[arm, seed] = mean[arm] + effect[seed] + residual

is fitted to all finished runs by least squares; arms may have different seeds. Its residual variance, with
runs - arms - seeds + 1 degrees of freedom, is the error of every comparison: three seeds of one pair say little about
how much runs vary, all runs of a study say it well. Two exceptions:

* If the arms' variances differ (Bartlett's test, p < 0.2), each arm keeps its own: Welch's interval. The level is high
  because the test misses much with three seeds, and an arm that varies more than the others then gets too narrow an
  interval: with a deviation eight times theirs, 95 % intervals cover in nine of ten studies (tests/experiments).
* Arms that evaluate one trained model (the study's TRAINED_MODEL) are compared model by model: a paired t interval.
  That arms share a seed, in contrast, is no pairing: effects of a seed on initial weights and batches are mostly lost
  after the first updates in another precision. The additive model takes out what is left of them.

A metric that is a percentage of a finite test set (the study's TEST_EXAMPLES) also varies with the choice of the set.
Its binomial variance is added, for a difference the sum of both: as if the arms were tested on different sets. Arms
mostly err on the same examples, so this is too wide; which examples they err on is not in the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from bitnet_experiments.intervals import Estimate, Range, interval, with_sampling
from bitnet_experiments.study import Row, Study
from bitnet_jax.evaluation.intervals import proportion

UNEQUAL = 0.2  # p-value of Bartlett's test below which arms keep their own variances


def values(rows: Iterable[Row], arm: str, metric: str) -> dict[int, float]:
    """Seed -> metric, over the finished runs of an arm that have the metric."""
    return {
        row["seed"]: row[metric]
        for row in rows
        if row["arm"] == arm and row["status"] == "finished" and row.get(metric) is not None
    }


def diverged_share(rows: Iterable[Row], arms: Sequence[str]) -> Range | None:
    """The share of runs of these arms that diverged, with Wilson's 95 % interval; None without a run."""
    ended = [row["status"] == "diverged" for row in rows if row["arm"] in arms and row["status"] != "failed"]
    return Range(*proportion(sum(ended), len(ended))) if ended else None


class Additive(NamedTuple):
    """Least squares of the additive model."""

    columns: dict[str, int]  # of the arms
    coefficients: NDArray[np.float64]
    inverse: NDArray[np.float64]  # pseudoinverse of X'X
    projection: NDArray[np.float64]  # onto the combinations that the runs determine
    deviation: float  # of the residual
    df: int

    def combination(self, weights: Mapping[str, float]) -> Estimate | None:
        """Of the arms' means; None if the runs do not determine it, or nothing is left to estimate the error."""
        c = np.zeros(len(self.coefficients))
        for arm, weight in weights.items():
            c[self.columns[arm]] = weight
        if self.df < 1 or not np.allclose(self.projection @ c, c, atol=1e-8):
            return None
        error = self.deviation * math.sqrt(max(float(c @ self.inverse @ c), 0.0))
        return Estimate(float(c @ self.coefficients), error, self.df, "pooled")


def additive(found: Mapping[str, Mapping[int, float]]) -> Additive:
    """Fits arm -> seed -> metric. Arms without a run are left out."""
    runs = [(arm, seed, y) for arm, of in found.items() for seed, y in of.items()]
    arms = {arm: i for i, arm in enumerate(dict.fromkeys(arm for arm, _, _ in runs))}
    seeds = {seed: len(arms) + i for i, seed in enumerate(dict.fromkeys(seed for _, seed, _ in runs))}
    X, y = np.zeros((len(runs), len(arms) + len(seeds))), np.array([y for _, _, y in runs])
    for i, (arm, seed, _) in enumerate(runs):
        X[i, arms[arm]] = X[i, seeds[seed]] = 1.0
    gram = X.T @ X
    inverse = np.linalg.pinv(gram, hermitian=True).astype(np.float64)
    projection = inverse @ gram
    coefficients: NDArray[np.float64] = inverse @ X.T @ y
    df = len(runs) - round(float(np.trace(projection)))
    squares = float(np.sum((y - X @ coefficients) ** 2))
    deviation = math.sqrt(squares / df) if df > 0 else math.nan
    return Additive(arms, coefficients, inverse, projection, deviation, df)


def bartlett(found: Mapping[str, Mapping[int, float]]) -> float:
    """p-value of equal variances of the arms with at least two runs; 0 if only some do not vary at all."""
    groups = [list(of.values()) for of in found.values() if len(of) > 1]
    spread = [np.ptp(group) > 0 for group in groups]
    if len(groups) < 2 or not all(spread):
        return 0.0 if any(spread) and not all(spread) else 1.0
    return float(scipy.stats.bartlett(*groups).pvalue)


def welch(weights: Mapping[str, float], found: Mapping[str, Mapping[int, float]]) -> Estimate:
    """sum of weight mean with error^2 = sum of weight^2 s^2 / n, and Satterthwaite's degrees of freedom."""
    parts = [(weight, interval(list(found[arm].values()))) for arm, weight in weights.items()]
    mean = sum(weight * part.mean for weight, part in parts)
    variances = [(weight * part.error) ** 2 for weight, part in parts]
    total, own = sum(variances), [part.df for _, part in parts]
    if not total > 0:  # NaN of a single run, or runs that do not vary
        return Estimate(mean, math.sqrt(total), max(own) if own else math.nan, "Welch")
    df = total**2 / sum(v**2 / n for v, n in zip(variances, own, strict=True))
    return Estimate(mean, math.sqrt(total), df, "Welch")


class Contrasts:
    """Comparisons of a study's arms in one metric."""

    def __init__(self, study: Study, rows: Sequence[Row], metric: str | None = None) -> None:
        self.metric = metric or study.metric
        self.study = study
        self.found = {arm: of for arm in study.arms if (of := values(rows, arm, self.metric))}
        self.model = additive(self.found)
        self.p_equal = bartlett(self.found)

    def arm(self, arm: str) -> Estimate | None:
        """An arm's mean over its own seeds, with the sampling of the test set; None without a finished run."""
        if arm not in self.found:
            return None
        return with_sampling(interval(list(self.found[arm].values())), self._sampling({arm: 1.0}))

    def difference(self, arm: str, other: str) -> Estimate | None:
        """arm minus other; None if either has no finished run."""
        return self.combination({arm: 1.0, other: -1.0})

    def combination(self, weights: Mapping[str, float]) -> Estimate | None:
        """A weighted sum of the arms' means, with the error that the module's text says; None if a run is missing."""
        if not all(arm in self.found for arm in weights):
            return None
        found = self._paired(weights)
        if found is None and self.p_equal >= UNEQUAL:
            found = self.model.combination(weights)
        return with_sampling(found or welch(weights, self.found), self._sampling(weights))

    def check(self, weights: Mapping[str, float]) -> Estimate:
        """Welch's interval of the same combination."""
        return with_sampling(welch(weights, self.found), self._sampling(weights))

    def disagrees(self, arm: str, other: str) -> bool:
        """Do the pooled and Welch's interval of a difference disagree about 0?"""
        used, own = self.difference(arm, other), self.check({arm: 1.0, other: -1.0})
        return used is not None and used.method == "pooled" and (used.p < 0.05) != (own.p < 0.05)

    def _paired(self, weights: Mapping[str, float]) -> Estimate | None:
        of = self.study.trained_model
        if of is None or len({of(arm) for arm in weights}) > 1 or abs(sum(weights.values())) > 1e-12:
            return None
        seeds = set.intersection(*(set(self.found[arm]) for arm in weights))
        sums = [sum(w * self.found[arm][seed] for arm, w in weights.items()) for seed in sorted(seeds)]
        return interval(sums)._replace(method="paired") if sums else None

    def _sampling(self, weights: Mapping[str, float]) -> float:
        """Binomial variance of the test set; the metric is in per cent."""
        examples = self.study.test_examples.get(self.metric)
        if examples is None:
            return 0.0
        means = {arm: float(np.mean(list(self.found[arm].values()))) for arm in weights}
        return sum(w**2 * means[arm] * (100 - means[arm]) / examples for arm, w in weights.items())

    def note(self, used: Iterable[Estimate]) -> str:
        """Where the errors of these estimates come from."""
        methods = {estimate.method for estimate in used}
        texts = []
        if "pooled" in methods:
            texts.append(
                f"differences have the pooled residual of the study, {self.model.deviation:.4f} with {self.model.df} "
                "degrees of freedom after arm and seed"
            )
        if "Welch" in methods:
            why = (
                f"variances of arms differ (Bartlett's test, p = {self.p_equal:.2g})"
                if self.p_equal < UNEQUAL
                else "the runs do not determine pooled ones"
            )
            texts.append(f"differences have Welch's intervals, as {why}")
        if "paired" in methods:
            texts.append("arms that evaluate one trained model are compared model by model, by paired t")
        if self.metric in self.study.test_examples:
            examples = self.study.test_examples[self.metric]
            texts.append(f"intervals include the sampling of {examples:,} test examples")
        return "; ".join(texts)
