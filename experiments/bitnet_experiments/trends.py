"""How a difference between arms changes with size: its regression on log10 of the size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitnet_experiments.axes import legend, ticks
from bitnet_experiments.contrasts import Contrasts
from bitnet_experiments.intervals import Estimate
from bitnet_experiments.sections import Section, SectionMaker, markdown_table
from bitnet_experiments.study import Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pairs = Mapping[float, tuple[str, str]]  # size -> (arm, other arm)


def slope(study: Study, rows: Sequence[Row], pairs: Pairs) -> Estimate | None:
    """Slope of (arm minus other) over log10 size, per decade; None if an arm has no finished run.

    For x = log10 size and w = (x - mean x) / sum (x - mean x)^2 it is the sum of w (arm - other), a combination of
    means of arms, with the error of one.
    """
    x = np.log10(list(pairs))
    return _weighted(study, rows, pairs, (x - x.mean()) / np.sum((x - x.mean()) ** 2))


def middle(study: Study, rows: Sequence[Row], pairs: Pairs) -> Estimate | None:
    """The mean of (arm minus other) over the sizes: the regression's value at their geometric mean."""
    return _weighted(study, rows, pairs, np.full(len(pairs), 1 / len(pairs)))


def _weighted(
    study: Study, rows: Sequence[Row], pairs: Pairs, weights: NDArray[np.float64]
) -> Estimate | None:
    """The sum over the sizes of weight times (arm minus other)."""
    of_arms: dict[str, float] = {}
    for weight, (arm, other) in zip(weights, pairs.values(), strict=True):
        of_arms[arm] = of_arms.get(arm, 0.0) + float(weight)
        of_arms[other] = of_arms.get(other, 0.0) - float(weight)
    return Contrasts(study, rows).combination(of_arms)


def trends_table(series: Mapping[str, Pairs], unit: str = "parameters") -> SectionMaker:
    """One line per series: the mean difference at the geometric mean of the sizes, and its change per decade."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        lines, used = [], []
        for name, pairs in series.items():
            mean, change = middle(study, rows, pairs), slope(study, rows, pairs)
            if mean is not None and change is not None:
                centre = math.exp(np.mean(np.log(list(pairs))))
                lines.append([name, f"{mean} at {centre:,.0f}", str(change)])
                used += [mean, change]
        header = [f"difference of {study.metric}", f"mean at {unit}", "change per decade"]
        note = Contrasts(study, rows).note(used)
        return Section(
            f"{markdown_table(header, lines)}\n\nLinear regression of the difference on log10 {unit}; {note}."
            if lines
            else ""
        )

    return make


def trends_figure(figure: str, series: Mapping[str, Pairs], xlabel: str) -> SectionMaker:
    """The differences against size with their 95 % intervals, one line per series."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        contrasts = Contrasts(study, rows)
        found: dict[str, list[tuple[float, float, float]]] = {}
        for name, pairs in series.items():
            for size, pair in pairs.items():
                if (one := contrasts.difference(*pair)) is not None:
                    found.setdefault(name, []).append((size, one.mean, one.half))

        def draw(axes: Axes) -> None:
            for name, points in found.items():
                x, y, half = zip(*points, strict=True)
                axes.errorbar(x, y, np.nan_to_num(half), fmt="o-", capsize=3, markersize=4, label=name)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set(xlabel=xlabel, ylabel="difference (nats)", xscale="log", title=study.name)
            ticks(axes, (point[0] for points in found.values() for point in points))
            legend(axes)

        return Section("", figure, draw, found) if found else Section("")

    return make
