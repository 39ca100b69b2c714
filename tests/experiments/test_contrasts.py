"""Differences between arms: by hand on small tables, and the coverage of their intervals in simulations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitnet_experiments.contrasts import Contrasts, additive, bartlett, diverged_share, welch
from bitnet_experiments.study import Study
from bitnet_experiments.trends import middle, slope

A_AND_B = {"A": {0: 1.0, 1: 3.0}, "B": {0: 2.0, 1: 5.0}}


def rows_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "status": "finished", "valid_loss": y}
        for arm, of in table.items()
        for seed, y in dict(of).items()
    ]


def with_arms(study: Study, *arms: str, **more: Any) -> Study:
    return dataclasses.replace(
        study, arms={arm: {} for arm in arms}, baseline=arms[0], small_arms=None, claims=(), **more
    )


def test_two_arms_by_hand() -> None:
    # Fitted: 0.75, 3.25 and 2.25, 4.75; residuals +-0.25, so s^2 = 4 / 16 with 4 - 2 - 2 + 1 = 1 degree of freedom.
    found = additive(A_AND_B)
    assert (found.deviation, found.df) == (pytest.approx(0.5), 1)
    # error^2 of B - A: s^2 (1 / 2 + 1 / 2)
    assert found.combination({"B": 1.0, "A": -1.0})[:3] == pytest.approx((1.5, 0.5, 1.0))  # type: ignore[index]


def test_an_arm_without_all_seeds_by_hand() -> None:
    # C is fitted exactly. Fitted A at seed 0 is 0.75 A0 + 0.25 (A1 + B0 - B1) = 0.75, of variance 0.75 s^2.
    found = additive(A_AND_B | {"C": {0: 4.0}}).combination({"C": 1.0, "A": -1.0})
    assert found is not None
    assert found[:3] == pytest.approx((3.25, 0.5 * 1.75**0.5, 1.0))


def test_runs_that_share_no_seed_have_no_pooled_difference() -> None:
    apart = additive(
        {"A": {0: 1.0, 1: 2.0}, "B": {0: 2.0, 1: 2.5}, "C": {2: 1.0, 3: 2.0}, "D": {2: 0.0, 3: 1.5}}
    )
    assert apart.df == 8 - 6
    assert apart.combination({"A": 1.0, "B": -1.0}) is not None
    assert apart.combination({"A": 1.0, "C": -1.0}) is None


def test_welch_by_hand() -> None:
    # s^2 / n of 1, 2, 3 is 1/3, of 0, 4 it is 4: error^2 = 13/3, df = (13/3)^2 / ((1/3)^2 / 2 + 4^2 / 1) = 1.1696
    found = welch({"A": 1.0, "B": -1.0}, {"A": {0: 1.0, 1: 2.0, 2: 3.0}, "B": {0: 0.0, 1: 4.0}})
    assert found[:3] == pytest.approx((0.0, (13 / 3) ** 0.5, 1.1696), abs=1e-4)


def test_unequal_variances_lead_to_welch(study: Study) -> None:
    table = {"A": {0: 0.0, 1: 0.1, 2: -0.1}, "B": {0: 9.0, 1: 12.0, 2: 2.0}, "C": {0: 1.0, 1: 1.1, 2: 1.1}}
    found = Contrasts(with_arms(study, "A", "B", "C"), rows_of(table))
    assert found.p_equal < 0.01
    assert found.difference("B", "A").method == "Welch"  # type: ignore[union-attr]
    assert bartlett(A_AND_B) > 0.5
    assert bartlett({"A": {0: 1.0, 1: 1.0}, "B": {0: 1.0, 1: 2.0}}) == 0
    assert Contrasts(with_arms(study, "A", "B"), rows_of(A_AND_B)).difference("B", "A").method == "pooled"  # type: ignore[union-attr]


def test_arms_of_one_trained_model_are_paired(study: Study) -> None:
    table = {"A": {0: 1.0, 1: 3.0}, "A rounded": {0: 1.5, 1: 3.6}, "B": {0: 2.0, 1: 5.0}}
    shared = with_arms(study, *table, trained_model=lambda arm: arm.split()[0])
    found = Contrasts(shared, rows_of(table))
    # differences 0.5 and 0.6: t(0.975, 1) = 12.7062, standard error 0.05
    assert str(found.difference("A rounded", "A")) == "0.5500 ± 0.6353"
    assert found.difference("A rounded", "B").method != "paired"  # type: ignore[union-attr]
    assert found.difference("gone", "A") is None


def test_an_error_rate_includes_the_sampling_of_its_test_set(study: Study) -> None:
    table = {"A": {0: 10.0, 1: 10.0}, "B": {0: 20.0, 1: 20.0}}
    tested = with_arms(study, "A", "B", test_examples={"valid_loss": 100})
    # without variance over seeds: 100 x (0.1 x 0.9 + 0.2 x 0.8) = 25 in per cent squared
    found = Contrasts(tested, rows_of(table)).difference("B", "A")
    assert found is not None
    assert found.error == pytest.approx(5.0)


def test_slope_and_middle_of_a_penalty(study: Study) -> None:
    """Penalties 0.3, 0.2, 0.1 at 1, 10, 100: -0.1 a decade, 0.2 in the middle."""
    table = {f"few {n}": {0: y, 1: y + 0.5} for n, y in ((1, 1.3), (10, 1.2), (100, 1.1))}
    table |= {f"float {n}": {0: 1.0, 1: 1.5} for n in (1, 10, 100)}
    pairs = {n: (f"few {n}", f"float {n}") for n in (1, 10, 100)}
    sized, rows = with_arms(study, *table), rows_of(table)
    assert slope(sized, rows, pairs).mean == pytest.approx(-0.1)  # type: ignore[union-attr]
    assert middle(sized, rows, pairs).mean == pytest.approx(0.2)  # type: ignore[union-attr]


def test_the_share_of_diverged_runs() -> None:
    rows = [{"arm": "A", "status": status} for status in ("finished", "diverged", "failed")]
    found = diverged_share(rows, ("A",))
    assert found is not None
    assert found.mean == 0.5
    assert diverged_share(rows, ("B",)) is None


def coverage(
    study: Study, draw: Callable[[np.random.Generator], Any], pair: tuple[str, str], truth: float
) -> float:
    """The share of 400 simulated studies whose interval of a difference contains the truth."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(400):
        table = {arm: dict(enumerate(ys)) for arm, ys in zip(study.arms, draw(generator), strict=True)}
        found = Contrasts(study, rows_of(table)).difference(*pair)
        assert found is not None
        hits += found.low <= truth <= found.high
    return hits / 400  # three standard errors are 0.033


@pytest.mark.extended
@pytest.mark.parametrize(
    ("noisy", "pair", "expected"),
    [
        pytest.param(1.0, ("b", "a"), 0.95, id="equal variances"),
        pytest.param(8.0, ("b", "a"), 0.97, id="quiet arms beside a noisy one"),
        pytest.param(8.0, ("e", "a"), 0.91, id="the noisy arm"),
    ],
)
def test_intervals_cover_the_true_difference(
    study: Study, noisy: float, pair: tuple[str, str], expected: float
) -> None:
    """Five arms of three seeds, an effect of the seed, and the choice between pooled and Welch's intervals."""
    spread = np.array([1.0, 1.0, 1.0, 1.0, noisy])[:, None]

    def draw(generator: np.random.Generator) -> Any:
        return spread * generator.normal(size=(5, 3)) + 0.7 * generator.normal(size=3)

    assert coverage(with_arms(study, *"abcde"), draw, pair, 0.0) == pytest.approx(expected, abs=0.033)


@pytest.mark.extended
def test_intervals_of_error_rates_cover_for_a_test_set_that_is_drawn(study: Study) -> None:
    """Arms err by 10 and 14 % on the population, on common examples: the interval is too wide, never too narrow."""
    tested = with_arms(study, "a", "b", test_examples={"valid_loss": 200})

    def draw(generator: np.random.Generator) -> Any:
        hard = generator.uniform(size=200)  # of an example, for both arms and every seed
        noise = 0.02 * generator.normal(size=(2, 3, 200))
        return 100 * np.mean(hard + noise < np.array([0.10, 0.14])[:, None, None], axis=2)

    assert coverage(tested, draw, ("b", "a"), 4.0) >= 0.95
