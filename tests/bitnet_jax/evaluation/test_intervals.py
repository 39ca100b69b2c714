"""Confidence intervals against known values and their empirical coverage."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_jax.evaluation.intervals import bootstrap, mean, mean_of_proportions, proportion


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Wilson's formula restated: the p at which (x / n - p)^2 = z^2 p (1 - p) / n.
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(successes: int, count: int, low: float, high: float) -> None:
    estimate = proportion(successes, count)
    assert estimate.value == successes / count
    assert estimate[1:] == pytest.approx((low, high), abs=5e-5)
    for end in estimate[1:]:
        if 0 < end < 1:
            squared = (estimate.value - end) ** 2
            assert squared == pytest.approx(1.959964**2 * end * (1 - end) / count, rel=1e-5)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5])
def test_wilson_has_its_nominal_coverage(p: float) -> None:
    draws = np.random.default_rng(1).binomial(200, p, 2000)
    held = np.mean([proportion(int(x), 200).low <= p <= proportion(int(x), 200).high for x in draws])
    assert held == pytest.approx(
        0.95, abs=0.025
    )  # counts are discrete; the standard error of 2,000 draws is 0.005


def test_invalid_counts_are_rejected() -> None:
    for successes, count in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="expected 0 to count"):
            proportion(successes, count)


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(3, 2, 400)
    estimate = mean(values)
    assert estimate == mean(values)
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    # 1000 resamples estimate a 2.5 % quantile to about 7 % of the half width.
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.2)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.2)


def test_bootstrap_of_any_statistic() -> None:
    values = np.arange(101)
    estimate = bootstrap(lambda part: float(np.median(values[part])), 101)
    assert estimate.value == 50
    assert estimate.low < 50 < estimate.high


def test_the_mean_of_groups() -> None:
    counts = np.array([1000, 10])
    estimate = mean_of_proportions(np.array([500, 9]), counts)
    assert estimate.value == pytest.approx((0.5 + 0.9) / 2)
    by_hand = 1.96 * np.sqrt(0.25 / 1000 + (10 / 12) * (2 / 12) / 10) / 2
    assert estimate.high - estimate.value == pytest.approx(by_hand, rel=1e-3)
    single = mean_of_proportions(np.array([1, 0, 1, 1]), np.ones(4, int))
    assert single.low < 0.5 < 0.75 == single.value
    assert single.high == 1


def test_the_interval_of_groups_covers_the_truth() -> None:
    truth, counts = np.linspace(0.1, 0.95, 20), np.full(20, 15)
    random = np.random.default_rng(3)
    estimates = [mean_of_proportions(random.binomial(counts, truth), counts) for _ in range(1000)]
    held = np.mean([e.low <= truth.mean() <= e.high for e in estimates])
    assert held == pytest.approx(0.96, abs=0.025)  # Laplace's estimate is deliberately slightly wide
