"""Sections of a study's report: pure functions from rows to a table or a figure.

A study lists them in REPORT. Each call below returns a function (study, rows) -> Section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitnet_experiments.fits import bootstrap, fit, held_out_error
from bitnet_experiments.intervals import Interval, detectable, interval, paired
from bitnet_experiments.study import Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes"], None]


class Section(NamedTuple):
    """Markdown, and optionally a function that draws the axes of the figure `<figure>.png`."""

    markdown: str
    figure: str | None = None
    draw: Draw | None = None


SectionMaker = Callable[[Study, Sequence[Row]], Section]


def values(rows: Iterable[Row], arm: str, metric: str) -> dict[int, float]:
    """Seed -> metric, over the finished runs of an arm that have the metric."""
    return {
        row["seed"]: row[metric]
        for row in rows
        if row["arm"] == arm and row["status"] == "finished" and row.get(metric) is not None
    }


def difference(study: Study, rows: Sequence[Row], arm: str, metric: str | None = None) -> list[float]:
    """Differences of an arm to the study's baseline, paired by seed."""
    metric = metric or study.metric
    return paired(values(rows, arm, metric), values(rows, study.baseline, metric))


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column and those whose header begins with < are text, the others numbers."""
    align = ["---" if i == 0 or name.startswith("<") else "--:" for i, name in enumerate(header)]
    names = [name.removeprefix("<") for name in header]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in (names, *lines))
    cells = [f"| {' | '.join(line)} |" for line in escaped]
    return "\n".join((cells[0], f"|{'|'.join(align)}|", *cells[1:]))


def _number(value: float, digits: int = 4) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def arms_table(*more: str, against: Callable[[str], str] | None = None) -> SectionMaker:
    """One line per arm: the metric, its paired difference to the baseline, and the detectable difference.

    Args:
      more: further fields of the rows, each a column of means (without interval).
      against: arm -> the arm it is compared with, if that is not always the study's baseline.
    """

    def make(study: Study, rows: Sequence[Row]) -> Section:
        name = study.baseline if against is None else "the arm named"
        header = ["arm", "seeds", study.metric, f"difference to {name}", "detectable", *more]
        header += ["parameters", "seconds per run"]
        lines = []
        for arm in study.arms:
            runs = [row for row in rows if row["arm"] == arm]
            good = values(rows, arm, study.metric)
            failed = [row["status"] for row in runs if row["status"] != "finished"]
            seeds = f"{len(good)}{''.join(f', {failed.count(s)} {s}' for s in sorted(set(failed)))}"
            if not good:
                lines.append([arm, seeds if runs else "not run", *[""] * (len(header) - 2)])
                continue
            base = study.baseline if against is None else against(arm)
            differences = [] if arm == base else paired(good, values(rows, base, study.metric))
            shown = str(interval(differences)) if differences else ""
            shown += f" ({base})" if differences and against is not None else ""
            line = [arm, seeds, str(interval(list(good.values()))), shown, _number(detectable(differences))]
            means = [list(values(rows, arm, field).values()) for field in more]
            line += [f"{np.mean(column):.4g}" if column else "" for column in means]
            sizes = sorted({row["parameters"] for row in runs if row.get("parameters")})
            line += [", ".join(f"{size:,}" for size in sizes)]
            line += [f"{np.mean([row['wall_seconds'] for row in runs]):.0f}"]
            lines.append(line)
        note = (
            "Mean ± half of the 95 % Student-t interval over seeds; differences are paired by seed. Detectable: the "
            "smallest true difference that a paired t-test at 5 % would have found with probability 0.8, given the "
            "spread seen here."
        )
        return Section(f"{markdown_table(header, lines)}\n\n{note}")

    return make


def measures_table(*fields: str) -> SectionMaker:
    """One line per arm: the mean of each field with its interval over seeds; fields missing in all rows are omitted."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        found = {field: {arm: values(rows, arm, field) for arm in study.arms} for field in fields}
        shown = [field for field in fields if any(found[field].values())]
        lines = [
            [arm, *(str(interval(list(found[field][arm].values()))) for field in shown)]
            for arm in study.arms
            if all(found[field][arm] for field in shown)
        ]
        return Section(markdown_table(["arm", *shown], lines))

    return make


def pairs_table(*pairs: tuple[str, str]) -> SectionMaker:
    """One line per pair (arm, other arm): the difference of the metric, paired by seed, and the detectable one."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        lines = []
        for arm, other in pairs:
            differences = paired(values(rows, arm, study.metric), values(rows, other, study.metric))
            if differences:
                lines.append(
                    [f"{arm} minus {other}", str(interval(differences)), _number(detectable(differences))]
                )
        return Section(markdown_table([f"difference of {study.metric}", "mean", "detectable"], lines))

    return make


def curves(figure: str = "curves", arms: Sequence[str] | None = None) -> SectionMaker:
    """Held-out loss over steps: the mean over seeds as a line, the range over seeds as a band."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        histories = {
            arm: [
                r["history"]
                for r in rows
                if r["arm"] == arm and r["status"] == "finished" and r.get("history")
            ]
            for arm in arms or study.arms
        }

        def draw(axes: Axes) -> None:
            for arm, history in histories.items():
                if history:
                    steps = [point["step"] for point in history[0]]
                    losses = np.array([[point["valid_loss"] for point in one] for one in history])
                    (line,) = axes.plot(steps, losses.mean(0), label=arm)
                    axes.fill_between(steps, losses.min(0), losses.max(0), alpha=0.2, color=line.get_color())
            axes.set(
                xlabel="step", ylabel="held-out loss (nats)", title=f"{study.name}: mean and range over seeds"
            )
            axes.legend(fontsize="small")

        return Section("", figure, draw)

    return make


class Point(NamedTuple):
    """One arm in a figure of y against x."""

    x: float
    series: str = ""
    label: str = ""


def size_law(
    figure: str, place: Callable[[str, Row], Point | None], *, metric: str | None = None, xlabel: str
) -> SectionMaker:
    """`L(N) = a N^-b + c` fitted to all runs of each series: constants with intervals, and the curves.

    The points of the figure are means with 95 % intervals over seeds.

    Args:
      place: (arm, one of its rows) -> N and series, as in `points`.
    """

    def make(study: Study, rows: Sequence[Row]) -> Section:
        measured: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            point = place(row["arm"], row) if row["status"] == "finished" else None
            if point is not None:
                measured.setdefault(point.series, []).append((point.x, row[metric or study.metric]))
        fitted, lines = {}, []
        for series, pairs in measured.items():
            N, L = np.array(pairs).T
            if len(np.unique(N)) < 4:  # a law with three constants fits any three sizes
                continue
            fitted[series] = fit("power", [N], L)
            spread = bootstrap("power", [N], L)
            constants = [
                f"{value:.3g} ({spread[name][0]:.3g} to {spread[name][1]:.3g})"
                for name, value in fitted[series].constants.items()
            ]
            lines.append([series, *constants, f"{held_out_error('power', [N], L):+.2%}"])
        header = ["series", "a", "b", "c", "largest size, predicted from the others"]
        note = (
            f"Fits of L(N) = a N^-b + c, N in {xlabel}, Huber loss of log residuals, 95 % bootstrap intervals over "
            "runs. Last column: relative error of the mean loss at the largest size, from a fit to all smaller ones."
        )

        def draw(axes: Axes) -> None:
            for series, pairs in measured.items():
                N, L = np.array(pairs).T
                sizes = np.unique(N)
                means = [interval(L[size == N].tolist()) for size in sizes]
                half = [np.nan_to_num(mean.half) for mean in means]
                dots, *_ = axes.errorbar(
                    sizes, [mean.mean for mean in means], half, fmt="o", capsize=3, markersize=4, label=series
                )
                if series in fitted:
                    grid = np.geomspace(N.min(), N.max(), 100)
                    axes.plot(grid, fitted[series](grid), color=dots.get_color())
            axes.set(xlabel=xlabel, ylabel="held-out loss (nats)", xscale="log", title=study.name)
            axes.legend(fontsize="small")

        return Section(f"{markdown_table(header, lines)}\n\n{note}" if lines else "", figure, draw)

    return make


def points(
    figure: str,
    place: Callable[[str, Row], Point | None],
    *,
    metric: str | None = None,
    xlabel: str,
    ylabel: str = "held-out loss (nats)",
    xscale: str = "linear",
    joined: bool = True,
) -> SectionMaker:
    """y against x with the 95 % interval over seeds as error bars, one point per arm.

    Args:
      place: (arm, one of its rows) -> the arm's point and series; None omits the arm.
      joined: connect the points of a series by a line.
    """

    def make(study: Study, rows: Sequence[Row]) -> Section:
        found: dict[str, list[tuple[Point, Interval]]] = {}
        for arm in study.arms:
            good = values(rows, arm, metric or study.metric)
            row = next((row for row in rows if row["arm"] == arm and row["status"] == "finished"), None)
            point = None if row is None or not good else place(arm, row)
            if point is not None:
                found.setdefault(point.series, []).append((point, interval(list(good.values()))))

        def draw(axes: Axes) -> None:
            for series, places in found.items():
                places = sorted(places, key=lambda pair: pair[0].x)
                x, y = [point.x for point, _ in places], [y.mean for _, y in places]
                half = [0.0 if math.isnan(y.half) else y.half for _, y in places]
                axes.errorbar(
                    x, y, half, fmt="o-" if joined else "o", capsize=3, markersize=4, label=series or None
                )
                for point, mean in places:
                    if point.label:
                        axes.annotate(
                            point.label,
                            (point.x, mean.mean),
                            (4, 4),
                            textcoords="offset points",
                            fontsize="x-small",
                        )
            axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, title=study.name)
            if any(found):
                axes.legend(fontsize="small")

        return Section("", figure, draw)

    return make
