"""What a study's report is made of: pure functions from rows to a table or a figure.

A study lists them in REPORT. Each call below returns a function (study, rows) -> Section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.intervals import Interval, detectable, interval, paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from experiments.study import Study

Row = Mapping[str, Any]
Draw = Callable[["Axes"], None]


class Section(NamedTuple):
    """Markdown, and what fills the axes of the figure `<figure>.png`, if there is one."""

    markdown: str
    figure: str | None = None
    draw: Draw | None = None


SectionMaker = Callable[["Study", Sequence[Row]], Section]


def values(rows: Iterable[Row], arm: str, metric: str) -> dict[int, float]:
    """Seed -> figure of the finished runs of an arm that have it."""
    return {
        row["seed"]: row[metric]
        for row in rows
        if row["arm"] == arm and row["status"] == "finished" and row.get(metric) is not None
    }


def difference(study: Study, rows: Sequence[Row], arm: str, metric: str | None = None) -> list[float]:
    """Of an arm to the study's baseline, paired by seed."""
    metric = metric or study.metric
    return paired(values(rows, arm, metric), values(rows, study.baseline, metric))


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others numbers. A header that begins with < is text, too."""
    align = ["---" if i == 0 or name.startswith("<") else "--:" for i, name in enumerate(header)]
    names = [name.removeprefix("<") for name in header]
    cells = [f"| {' | '.join(line)} |" for line in (names, *lines)]
    return "\n".join((cells[0], f"|{'|'.join(align)}|", *cells[1:]))


def _number(value: float, digits: int = 4) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def arms_table(*more: str) -> SectionMaker:
    """One line an arm: the metric, its paired difference to the baseline, what difference would have been seen.

    Args:
      more: further fields of the rows, each a column of means (without interval).
    """

    def make(study: Study, rows: Sequence[Row]) -> Section:
        header = ["arm", "seeds", study.metric, f"difference to {study.baseline}", "detectable", *more]
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
            line = [arm, seeds, str(interval(list(good.values())))]
            apart = [] if arm == study.baseline else difference(study, rows, arm)
            line += [str(interval(apart)) if apart else "", _number(detectable(apart))]
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


def curves(figure: str = "curves", arms: Sequence[str] | None = None) -> SectionMaker:
    """Held-out loss over steps: the mean over seeds as a line, the range as a band."""

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
    """y against x with the 95 % interval over seeds as error bars, one point an arm.

    Args:
      place: (arm, one of its rows) -> where its point is and to which series it belongs; None leaves it out.
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
