"""Fits recover the constants that generated the data, including those of published laws."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_experiments.fits import LAWS, bootstrap, effective_size, fit, held_out_error

SPECTRA_SIZES = np.array([99.74, 190.0, 392.4, 569.2, 834.0, 1149, 1515, 2461, 3989]) * 1e6
SIZES, TOKENS = np.repeat([0.02, 0.05, 0.1, 0.2, 0.5], 4), np.tile([0.5, 1.0, 2.0, 4.0], 5)
BITS = np.tile([1.0, 1.585, 2.0, 4.0, 16.0], 4)


@pytest.mark.parametrize(("a", "c"), [(185.0, 1.76), (159.0, 1.67)], ids=["ternary", "float"])
def test_the_published_laws_of_spectra(a: float, c: float) -> None:
    """2407.12327: L = 185 N^-0.26 + 1.76 (TriLM), 159 N^-0.26 + 1.67 (FloatLM)."""
    found = fit("power", [SPECTRA_SIZES], a * SPECTRA_SIZES**-0.26 + c, starts=10)
    assert found.constants == pytest.approx({"a": a, "b": 0.26, "c": c}, rel=1e-4)
    # The losses of the two laws at both ends of the model suite.
    expected = {185.0: (3.300, 2.350), 159.0: (2.993, 2.177)}[a]
    np.testing.assert_allclose(found([99.74e6, 3.989e9]), expected, rtol=0, atol=6e-4)  # three decimals


def test_loss_in_size_and_tokens() -> None:
    constants = {"E": 1.2, "A": 0.4, "alpha": 0.3, "B": 0.5, "beta": 0.4}
    losses = LAWS["chinchilla"].formula([SIZES, TOKENS], **constants)
    assert fit("chinchilla", [SIZES, TOKENS], losses, starts=10).constants == pytest.approx(
        constants, rel=1e-3
    )
    noisy = losses * np.exp(np.random.default_rng(0).normal(0, 1e-3, losses.size))
    found = fit("chinchilla", [SIZES, TOKENS], noisy, starts=10)
    assert found.constants == pytest.approx(constants, rel=0.1)
    assert 0 < found.error < 5e-3


def test_an_outlier_has_little_effect_on_the_fit() -> None:
    losses = LAWS["power"].formula([SIZES], a=0.5, b=0.3, c=1.0)
    spoiled = losses.copy()
    spoiled[0] *= 1.2
    assert fit("power", [SIZES], spoiled, starts=10).constants == pytest.approx(
        {"a": 0.5, "b": 0.3, "c": 1.0}, rel=0.01
    )


def test_effective_size_has_the_published_factors() -> None:
    # 2411.04330 with gamma = 2.6745: 1, 1.58, 2, 3, 4, 8 bits
    factors = [0.312, 0.446, 0.527, 0.674, 0.776, 0.950]
    np.testing.assert_allclose(effective_size(1.0, [1, 1.58, 2, 3, 4, 8], 2.6745), factors, atol=5e-4)


def test_precision_law_with_the_published_gamma() -> None:
    sizes = np.repeat([0.02, 0.05, 0.1, 0.2], 5)
    constants = {"E": 1.3, "A": 0.4, "alpha": 0.4, "gamma": 2.6745}
    losses = LAWS["precision"].formula([sizes, BITS], **constants)
    assert fit("precision", [sizes, BITS], losses, starts=10).constants == pytest.approx(constants, rel=1e-4)


@pytest.mark.extended
def test_bootstrap_intervals_cover_the_truth() -> None:
    """A 95 % interval may miss; all three constants must lie inside for this fixed seed."""
    generator = np.random.default_rng(1)
    sizes = np.repeat(np.geomspace(0.02, 2.0, 8), 3)
    losses = LAWS["power"].formula([sizes], a=0.5, b=0.3, c=1.0) * np.exp(
        generator.normal(0, 2e-3, sizes.size)
    )
    intervals = bootstrap("power", [sizes], losses, draws=60)
    for name, truth in {"a": 0.5, "b": 0.3, "c": 1.0}.items():
        low, high = intervals[name]
        assert low < truth < high
        assert high - low < 0.5


@pytest.mark.extended
def test_held_out_error_is_that_of_the_largest_model() -> None:
    sizes = np.geomspace(0.02, 2.0, 5)
    losses = LAWS["power"].formula([sizes], a=0.5, b=0.3, c=1.0)
    assert held_out_error("power", [sizes], losses) == pytest.approx(0, abs=1e-6)
    losses[-1] *= 1.1  # the law predicts 1 / 1.1 of the measured value
    assert held_out_error("power", [sizes], losses) == pytest.approx(1 / 1.1 - 1, abs=1e-6)


def test_data_that_cannot_be_fitted_is_rejected() -> None:
    with pytest.raises(ValueError, match="got 2 points for 3 constants; measure more sizes"):
        fit("power", [[1.0, 2.0]], [1.0, 2.0])
    with pytest.raises(ValueError, match="not positive"):
        fit("power", [[1.0, 2.0, 3.0]], [1.0, float("nan"), 2.0])
    with pytest.raises(ValueError, match="expected one of power, chinchilla, precision"):
        fit("cubic", [[1.0]], [1.0])
