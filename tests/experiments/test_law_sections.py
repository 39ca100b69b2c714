"""Tables and a figure of a law, from rows that a known law made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from bitnet_experiments.claims import Claim
from bitnet_experiments.law_sections import Place, factors, forms_table, gamma_table, measured_gamma
from bitnet_experiments.precision_laws import kumar
from bitnet_experiments.study import Study

GAMMA = 2.6745
ARMS = {
    f"{n} {ratio} {bits}": Place(n, n * ratio, bits)
    for n in (0.05, 0.1, 0.4)
    for ratio in (20.0, 80.0)
    for bits in (1.0, 2.0, 4.0, 16.0)
}


def rows(study: Study, seeds: int = 3) -> list[dict[str, object]]:
    random = np.random.default_rng(0)
    return [
        {
            "run": f"{arm}-seed{seed}", "arm": arm, "seed": seed, "status": "finished",
            study.metric: float(kumar(place, 1.1, 0.12, 0.45, 0.5, 0.35, GAMMA) * np.exp(random.normal(0, 1e-3))),
        }
        for arm, place in ARMS.items()
        for seed in range(seeds)
    ]  # fmt: skip


@pytest.mark.extended
def test_sections_of_a_law(study: Study) -> None:
    own = dataclasses.replace(
        study, arms={arm: {} for arm in ARMS}, baseline=next(iter(ARMS)), effect="", small_arms=None
    )
    found = rows(own)
    table = forms_table(ARMS.__getitem__)(own, found).markdown
    assert table.splitlines()[2].startswith("| Kumar | 6 | 0.0 |")
    assert "fitted to 72 runs" in table

    subsets = {"all": None, "below 3 bits": lambda data: data.P != 4.0}
    text = gamma_table(ARMS.__getitem__, subsets)(own, found).markdown
    assert [line.split(" | ")[0] for line in text.splitlines()[2:4]] == ["| all", "| below 3 bits"]

    section = factors("factors", ARMS.__getitem__)(own, found)
    assert section.draw is not None
    section.draw(plt.figure().subplots())
    for bits, factor, low, high in section.plotted["factors"]:
        assert low < factor < high
        np.testing.assert_allclose(factor, -np.expm1(-bits / GAMMA), rtol=0.05)


def test_gamma_is_the_effect_of_a_claim(study: Study, tmp_path: Path) -> None:
    own = dataclasses.replace(
        study, arms={arm: {} for arm in ARMS}, baseline=next(iter(ARMS)), small_arms=None
    )
    effect = measured_gamma(ARMS.__getitem__)
    claim = Claim(says="gamma = 2.67", measure=effect, between=(GAMMA, GAMMA))
    assert claim.outcome(effect(own, rows(own))) == "holds"
    few = [row for row in rows(own) if str(row["arm"]).startswith("0.05")]
    assert effect(own, few) is None
    assert forms_table(ARMS.__getitem__)(own, few).markdown == ""
