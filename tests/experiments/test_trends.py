"""Differences against size: their slope, their mean, the table and the figure."""

from __future__ import annotations

import dataclasses
import math

import matplotlib.pyplot as plt
import pytest

from bitnet_experiments.study import Study
from bitnet_experiments.trends import middle, slope, trends_figure, trends_table

SIZES = {10.0: 0.3, 100.0: 0.2, 1000.0: 0.1}  # size -> penalty
PAIRS = {size: (f"ternary {size:g}", f"float {size:g}") for size in SIZES}


def made(study: Study) -> tuple[Study, list[dict[str, object]]]:
    arms = {arm: {} for pair in PAIRS.values() for arm in pair}
    own = dataclasses.replace(study, arms=arms, baseline=next(iter(arms)), effect="", small_arms=None)
    rows: list[dict[str, object]] = [
        {"run": f"{arm}-{seed}", "arm": arm, "seed": seed, "status": "finished",
         "valid_loss": 2.0 + shift + noise * (-1) ** seed}
        for size, pair in PAIRS.items()
        for arm, shift, noise in zip(pair, (SIZES[size], 0.0), (0.001, 0.002), strict=True)
        for seed in range(4)
    ]  # fmt: skip
    return own, rows


def test_slope_and_middle_of_a_line(study: Study) -> None:
    own, rows = made(study)
    change, mean = slope(own, rows, PAIRS), middle(own, rows, PAIRS)
    assert change is not None
    assert mean is not None
    assert change.mean == pytest.approx(-0.1)  # per decade
    assert mean.mean == pytest.approx(0.2)
    assert 0 < change.half < 0.01
    assert slope(own, rows[:-4], PAIRS) is None  # an arm without runs


def test_table_and_figure_show_every_size(study: Study) -> None:
    own, rows = made(study)
    table = trends_table({"penalty": PAIRS}, unit="weights")(own, rows).markdown
    assert table.splitlines()[0] == "| difference of valid_loss | mean at weights | change per decade |"
    assert "at 100 " in table
    section = trends_figure("penalty", {"penalty": PAIRS, "none": {1.0: ("missing", "too")}}, "weights")(
        own, rows
    )
    assert list(section.plotted) == ["penalty"]
    assert [(size, round(mean, 6)) for size, mean, _ in section.plotted["penalty"]] == list(SIZES.items())
    assert all(0 < half < 0.01 and not math.isnan(half) for *_, half in section.plotted["penalty"])
    assert section.draw is not None
    section.draw(plt.figure().subplots())
    assert trends_figure("penalty", {"none": {1.0: ("missing", "too")}}, "weights")(own, rows).figure is None
