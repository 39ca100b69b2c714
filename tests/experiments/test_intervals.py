"""Intervals against known values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from bitnet_experiments.intervals import detectable, interval, paired


def test_the_interval_is_students_t() -> None:
    # t(0.975, 2) = 4.302653; standard error of 1, 2, 3 is 1 / sqrt(3)
    assert str(interval([1.0, 2.0, 3.0])) == "2.0000 ± 2.4841"
    assert str(interval([1.5])) == "1.5000 (one seed)"
    with pytest.raises(ValueError, match="got no values"):
        interval([])


def test_pairs_use_common_seeds() -> None:
    assert paired({1: 2.0, 2: 5.0, 3: 7.0}, {2: 4.0, 3: 5.0, 4: 0.0}) == [1.0, 2.0]


@pytest.mark.parametrize("n", [3, 10])
def test_the_detectable_difference_has_its_nominal_power(n: int) -> None:
    generator = np.random.default_rng(0)
    sample = generator.normal(size=n)
    effect = detectable(list(sample)) / np.std(
        sample, ddof=1
    )  # in units of the true standard deviation, here 1
    trials = generator.normal(effect, 1.0, (20_000, n))
    found = np.mean(scipy.stats.ttest_1samp(trials, 0.0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=0.01)  # three standard errors of 20,000 trials are 0.008
    assert math.isnan(detectable([1.0]))
    assert detectable([1.0, 1.0, 1.0]) == 0
