"""Intervals and tests against known values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from bitnet_experiments.intervals import (
    Estimate,
    detectable,
    holm,
    interval,
    paired,
    proportions,
    with_sampling,
)


def test_the_interval_is_students_t() -> None:
    # t(0.975, 2) = 4.302653; standard error of 1, 2, 3 is 1 / sqrt(3)
    found = interval([1.0, 2.0, 3.0])
    assert str(found) == "2.0000 ± 2.4841"
    # t = 2 / 0.57735 = 3.4641 with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2) = 0.0742
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert str(interval([1.5])) == "1.5000 (one seed)"
    with pytest.raises(ValueError, match="got no values"):
        interval([])


def test_pairs_use_common_seeds() -> None:
    assert paired({1: 2.0, 2: 5.0, 3: 7.0}, {2: 4.0, 3: 5.0, 4: 0.0}) == [1.0, 2.0]


def test_sampling_adds_a_known_variance() -> None:
    # 3 and 4 make 5; degrees of freedom 2 (25 / 9)^2 = 15.43
    assert with_sampling(Estimate(0.0, 3.0, 2.0), 16.0)[1:3] == pytest.approx((5.0, 15.4321), abs=1e-4)
    assert with_sampling(Estimate(0.0, 0.0, 2.0), 16.0)[1:3] == (4.0, math.inf)


def test_two_one_sided_tests_are_the_90_percent_interval() -> None:
    # t(0.95, 10) = 1.8125: 0.2 + 1.8125 * 0.1 = 0.38125
    assert Estimate(-0.2, 0.1, 10.0).within(0.382)
    assert not Estimate(-0.2, 0.1, 10.0).within(0.381)
    assert not Estimate(0.0, math.nan, math.nan).within(1.0)


def test_holm_stops_at_the_first_that_is_not_rejected() -> None:
    # thresholds 0.05 / 4, / 3, / 2, / 1 in the order of p: 0.03 > 0.025, so 0.04 is not tested
    assert holm([0.04, 0.01, 0.03, 0.016]) == [False, True, False, True]
    assert holm([]) == []


def test_proportions_have_newcombes_interval() -> None:
    # Newcombe 1998, table II, method 10: 56/70 - 48/80 = 0.2 (0.0524, 0.3339); 0/10 - 0/10 has 0 (-0.2775, 0.2775)
    assert proportions(56, 70, 48, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert proportions(0, 10, 0, 10) == pytest.approx((0.0, -0.2775, 0.2775), abs=1e-4)


@pytest.mark.parametrize("n", [3, 10])
def test_the_detectable_difference_has_its_nominal_power(n: int) -> None:
    generator = np.random.default_rng(0)
    sample = interval(list(generator.normal(size=n)))
    effect = detectable(sample) / (
        sample.error * math.sqrt(n)
    )  # in units of the true standard deviation, here 1
    trials = generator.normal(effect, 1.0, (20_000, n))
    found = np.mean(scipy.stats.ttest_1samp(trials, 0.0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=0.01)  # three standard errors of 20,000 trials are 0.008
    assert math.isnan(detectable(interval([1.0])))
    assert detectable(interval([1.0, 1.0, 1.0])) == 0
    assert detectable(Estimate(0.0, 1.0, 1e9)) == pytest.approx(1.95996 + 0.84162, abs=1e-4)
