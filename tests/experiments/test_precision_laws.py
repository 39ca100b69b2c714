"""The form that made the data is preferred, and its constants are found."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_experiments.fits import fit
from bitnet_experiments.precision_laws import DECISIVE, compare, forms, gamma

BITS = [1.0, 1.58, 2.0, 4.0, 16.0]
SHARED = {"E": 1.1, "A": 0.12, "alpha": 0.45, "B": 0.5, "beta": 0.35}
N, RATIO, P = (
    axis.ravel()
    for axis in np.meshgrid(np.geomspace(0.05, 1.0, 4), [20.0, 40.0, 80.0, 160.0], BITS, indexing="ij")
)
D = N * RATIO


def losses(form: str, *own: float, noise: float = 1e-3, seed: int = 0) -> np.ndarray:
    exact = forms(BITS)[form].formula([N, D, P], *SHARED.values(), *own)
    return exact * np.exp(np.random.default_rng(seed).normal(0, noise, N.size))


MADE = {
    "no bits": (),
    "Kumar": (2.6745,),
    "capacity": (0.35, 0.4, 0.7, 0.9),
    "both": (0.35, 0.4, 0.7, 0.9, 0.5, 0.6, 0.9, 0.95),
    "additive": (0.3, 0.4, 0.04, 0.02, 0.01, 0.003),
}


@pytest.mark.parametrize(
    "form",
    [
        "Kumar",
        "additive",
        *(pytest.param(form, marks=pytest.mark.extended) for form in ("no bits", "capacity", "both")),
    ],
)
def test_the_form_that_made_the_data_is_preferred(form: str) -> None:
    found = compare(N, D, P, losses(form, *MADE[form]), starts=8)
    assert found[0].form == form
    assert found[0].error == pytest.approx(1e-3, rel=0.3)
    assert abs(found[0].held_out) < 3e-3
    if form != "no bits":
        assert {row.form: row.bic for row in found}["no bits"] > found[0].bic + DECISIVE


def test_constants_are_recovered() -> None:
    exact = losses("additive", *MADE["additive"], noise=0.0)
    found = fit(forms(BITS)["additive"], [N, D, P], exact).constants
    assert list(found.values()) == pytest.approx([*SHARED.values(), *MADE["additive"]], rel=0.01)
    assert list(found)[-4:] == ["k_1", "k_1.58", "k_2", "k_4"]


def test_gamma_has_an_interval_around_the_truth() -> None:
    L = np.concatenate([losses("Kumar", 2.6745, seed=seed) for seed in range(3)])
    found = gamma(*(np.tile(v, 3) for v in (N, D, P)), L, draws=20)
    assert found.low < 2.6745 < found.high
    assert found.high - found.low < 0.3


def test_too_few_points_leave_forms_out() -> None:
    few = P != 2.0
    found = compare(N[few][:24], D[few][:24], P[few][:24], losses("Kumar", 2.6745)[few][:24], starts=8)
    assert {row.form for row in found} < {*forms(BITS), "separate"}
