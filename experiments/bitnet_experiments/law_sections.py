"""Sections of a study of loss against size, tokens and bits: forms compared, gamma, factors on size, a figure of them.

`place` gives an arm's N, D and P; see precision_laws.py for the forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitnet_experiments.axes import legend, ticks
from bitnet_experiments.fits import bootstrap, effective_size, fit
from bitnet_experiments.intervals import Range
from bitnet_experiments.precision_laws import DECISIVE, KUMAR, compare, forms, gamma
from bitnet_experiments.sections import Section, SectionMaker, markdown_table
from bitnet_experiments.study import Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED_GAMMA = 2.6745  # of weights: 2411.04330, appendix
DRAWS = 100  # of the bootstrap
_ENOUGH = 6  # pairs of size and tokens, more than the constants without bits


class Place(NamedTuple):
    """An arm's size and tokens, in millions, and its bits per weight."""

    N: float
    D: float
    P: float


class Measured(NamedTuple):
    """The finished runs as arrays [n]."""

    N: NDArray[np.float64]
    D: NDArray[np.float64]
    P: NDArray[np.float64]
    L: NDArray[np.float64]

    def where(self, keep: NDArray[np.bool_]) -> Measured:
        return Measured(*(values[keep] for values in self))

    @property
    def fittable(self) -> bool:
        points = {(n, d) for n, d in zip(self.N, self.D, strict=True)}
        return len(points) >= _ENOUGH and len(set(self.N)) > 1 and len(set(self.P)) > 1


def measured(study: Study, rows: Sequence[Row], place: Callable[[str], Place]) -> Measured:
    found = [(*place(row["arm"]), row[study.metric]) for row in rows if row["status"] == "finished"]
    return Measured(*np.array(found, float).reshape(-1, 4).T)


def measured_gamma(
    place: Callable[[str], Place], keep: Callable[[Measured], NDArray[np.bool_]] | None = None
) -> Callable[[Study, Sequence[Row]], Range | None]:
    """gamma as the effect of a claim; None while there are too few runs.

    Args:
      keep: which runs to fit; None: all.
    """

    def effect(study: Study, rows: Sequence[Row]) -> Range | None:
        data = measured(study, rows, place)
        used = data if keep is None else data.where(keep(data))
        return gamma(*used, draws=DRAWS) if used.fittable else None

    return effect


def forms_table(place: Callable[[str], Place]) -> SectionMaker:
    """One line per form of the law: constants, BIC above the best, residual, the largest size predicted."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        data = measured(study, rows, place)
        if not data.fittable:
            return Section("")
        found = compare(*data)
        lines = [
            [
                row.form,
                str(row.constants),
                f"{row.bic - found[0].bic:.1f}",
                f"{row.error:.2%}",
                f"{row.held_out:+.2%}",
            ]
            for row in found
        ]
        header = ["form", "constants", "BIC above the best", "residual", "largest size, predicted"]
        return Section(
            f"{markdown_table(header, lines)}\n\n"
            f"[Forms](../../bitnet_experiments/precision_laws.py) fitted to {data.L.size} runs. A difference of BIC "
            f"above {DECISIVE:g} is decisive. Residual: root mean square of log loss. Last column: relative error of "
            "the mean loss at the largest size, from a fit to all smaller ones."
        )

    return make


def gamma_table(
    place: Callable[[str], Place], subsets: Mapping[str, Callable[[Measured], NDArray[np.bool_]] | None]
) -> SectionMaker:
    """gamma of Kumar's form with its bootstrap interval, one line per subset of the runs."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        found = {name: measured_gamma(place, keep)(study, rows) for name, keep in subsets.items()}
        lines = [
            [name, f"{one.mean:.2f}", f"{one.low:.2f} to {one.high:.2f}"]
            for name, one in found.items()
            if one is not None
        ]
        table = markdown_table(["runs", "gamma", "95 % interval"], lines)
        return Section(
            f"{table}\n\nBootstrap of the runs of each arm. Published: {PUBLISHED_GAMMA}." if lines else ""
        )

    return make


def factors(figure: str, place: Callable[[str], Place]) -> SectionMaker:
    """The factor on N that P bits are worth, without a formula for it ("capacity"), beside Kumar's formula."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        data = measured(study, rows, place)
        if not data.fittable:
            return Section("")
        bits = np.unique(data.P).tolist()
        law, x = forms(bits)["capacity"], data[:3]
        constants, spread = fit(law, x, data.L).constants, bootstrap(law, x, data.L, draws=DRAWS, starts=2)
        names = {one: f"rho_{one:g}" for one in bits[:-1]}
        own = fit(KUMAR, x, data.L).constants["gamma"]
        published = {one: float(effective_size(1.0, one, PUBLISHED_GAMMA)) for one in names}
        lines = [
            [
                f"{one:g}",
                f"{constants[name]:.3f}",
                "{:.3f} to {:.3f}".format(*spread[name]),
                f"{published[one]:.3f}",
            ]
            for one, name in names.items()
        ]
        header = ["bits", "factor on N", "95 % interval", f"gamma = {PUBLISHED_GAMMA}"]

        def draw(axes: Axes) -> None:
            y = np.array([constants[name] for name in names.values()])
            ends = np.array([spread[name] for name in names.values()])
            error = np.abs(ends.T - y)
            axes.errorbar(list(names), y, error, fmt="o", capsize=3, markersize=4, label="fitted, no formula")
            grid = np.geomspace(min(bits), 8, 100)
            for value, label in (
                (own, f"gamma = {own:.2f}, fitted"),
                (PUBLISHED_GAMMA, "gamma = 2.67, published"),
            ):
                axes.plot(grid, effective_size(1.0, grid, value), label=label)
            axes.set(
                xlabel="bits per weight", ylabel="parameters that one is worth", xscale="log", ylim=(0, 1)
            )
            axes.set_title(study.name)
            ticks(axes, list(names))
            legend(axes)

        plotted = {
            "factors": [[one, constants[name], *spread[name]] for one, name in names.items()],
            "gamma": own,
        }
        return Section(markdown_table(header, lines), figure, draw, plotted)

    return make
