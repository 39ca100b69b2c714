"""Sections of a study's report: pure functions from rows to a table or a figure.

A study lists them in REPORT. Each call below returns a function (study, rows) -> Section.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitnet_experiments.axes import legend, styles, ticks
from bitnet_experiments.contrasts import Contrasts, values
from bitnet_experiments.fits import bootstrap, fit, held_out_error
from bitnet_experiments.intervals import Estimate, detectable, holm, interval
from bitnet_experiments.study import Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes"], None]


STATISTICS = "[How intervals and marks are computed](../../README.md#statistics)."


class Section(NamedTuple):
    """Markdown, and optionally a figure `<figure>.png`: a function that draws its axes, and the plotted values."""

    markdown: str
    figure: str | None = None
    draw: Draw | None = None
    plotted: Any = None  # nested lists and dicts of numbers and names


SectionMaker = Callable[[Study, Sequence[Row]], Section]


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column and those whose header begins with < are text, the others numbers."""
    align = ["---" if i == 0 or name.startswith("<") else "--:" for i, name in enumerate(header)]
    names = [name.removeprefix("<") for name in header]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in (names, *lines))
    cells = [f"| {' | '.join(line)} |" for line in escaped]
    return "\n".join((cells[0], f"|{'|'.join(align)}|", *cells[1:]))


def _number(value: float, digits: int = 4) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


class Differences:
    """The differences of one table: texts, marked where Holm's procedure over the table finds them, and a note."""

    def __init__(self, contrasts: Contrasts, pairs: Iterable[tuple[str, str]]) -> None:
        self.contrasts = contrasts
        found = {pair: contrasts.difference(*pair) for pair in pairs if pair[0] != pair[1]}
        self.estimates = {pair: estimate for pair, estimate in found.items() if estimate is not None}
        known = [pair for pair, estimate in self.estimates.items() if not math.isnan(estimate.error)]
        kept = holm([self.estimates[pair].p for pair in known])
        self.marked = {pair for pair, significant in zip(known, kept, strict=True) if significant}

    def cells(self, arm: str, other: str, named: bool = False) -> list[str]:
        """The difference, and the detectable one; empty for an arm without one."""
        estimate = self.estimates.get((arm, other))
        if estimate is None:
            return ["", ""]
        text = f"{estimate} ({other})" if named else str(estimate)
        text += " *" if (arm, other) in self.marked else ""
        text += " †" if self.contrasts.disagrees(arm, other) else ""
        return [text, _number(detectable(estimate))]

    def note(self) -> str:
        note = self.contrasts.note(self.estimates.values())
        texts = [f"{note[:1].upper()}{note[1:]}."] if note else []
        if self.marked:
            texts.append("* Not 0 at 5 % after Holm's correction over this table.")
        if any(self.contrasts.disagrees(*pair) for pair in self.estimates):
            texts.append("† Welch's interval disagrees about 0.")
        return " ".join(texts)


def arms_table(*more: str, against: Callable[[str], str] | None = None) -> SectionMaker:
    """One line per arm: the metric, its difference to the baseline, and the detectable difference.

    Args:
      more: further fields of the rows, each a column of means (without interval). Tuned values follow.
      against: arm -> the arm it is compared with, if that is not always the study's baseline.
    """

    def make(study: Study, rows: Sequence[Row]) -> Section:
        name = study.baseline if against is None else "the arm named"
        tuned = list(study.tune)
        header = ["arm", "seeds", study.metric, f"difference to {name}", "detectable", *more]
        header += [field.rpartition(".")[2] for field in tuned]
        header += ["parameters", "seconds per run"]
        contrasts = Contrasts(study, rows)
        base = {arm: study.baseline if against is None else against(arm) for arm in study.arms}
        differences, lines = Differences(contrasts, base.items()), []
        for arm in study.arms:
            runs = [row for row in rows if row["arm"] == arm]
            good = values(rows, arm, study.metric)
            failed = [row["status"] for row in runs if row["status"] != "finished"]
            seeds = f"{len(good)}{''.join(f', {failed.count(s)} {s}' for s in sorted(set(failed)))}"
            if not good:
                lines.append([arm, seeds if runs else "not run", *[""] * (len(header) - 2)])
                continue
            line = [arm, seeds, str(contrasts.arm(arm))]
            line += differences.cells(arm, base[arm], named=against is not None)
            means = [list(values(rows, arm, field).values()) for field in more]
            line += [f"{np.mean(column):.4g}" if column else "" for column in means]
            line += [
                ", ".join(f"{value:g}" for value in sorted({row["tuned"][f] for row in runs})) for f in tuned
            ]
            sizes = sorted({row["parameters"] for row in runs if row.get("parameters")})
            line += [", ".join(f"{size:,}" for size in sizes)]
            line += [f"{np.mean([row['wall_seconds'] for row in runs]):.0f}"]
            lines.append(line)
        note = f"Means ± half of their 95 % intervals over seeds. {differences.note()} {STATISTICS}"
        return Section(f"{markdown_table(header, lines)}\n\n{note.strip()}")

    return make


def measures_table(*fields: str) -> SectionMaker:
    """One line per arm: the mean of each field with its interval; fields missing in all rows are omitted."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        found = {field: Contrasts(study, rows, field) for field in fields}
        shown = [field for field in fields if found[field].found]
        lines = [
            [arm, *(str(found[field].arm(arm)) for field in shown)]
            for arm in study.arms
            if all(arm in found[field].found for field in shown)
        ]
        return Section(markdown_table(["arm", *shown], lines))

    return make


def pairs_table(*pairs: tuple[str, str], metric: str | None = None) -> SectionMaker:
    """One line per pair (arm, other arm): the difference of the metric, and the detectable one."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        contrasts = Contrasts(study, rows, metric)
        differences = Differences(contrasts, pairs)
        lines = [
            [f"{arm} minus {other}", *differences.cells(arm, other)] for arm, other in differences.estimates
        ]
        table = markdown_table([f"difference of {contrasts.metric}", "mean", "detectable"], lines)
        return Section(f"{table}\n\n{differences.note()}".strip() if differences.estimates else "")

    return make


def curves(figure: str = "curves", arms: Sequence[str] | None = None) -> SectionMaker:
    """Held-out loss over steps: the mean over seeds as a line, the range over seeds as a band.

    Where runs were evaluated only once, at the end, the metric of every arm with its 95 % interval instead.
    """

    def make(study: Study, rows: Sequence[Row]) -> Section:
        histories = {
            arm: [
                [(point["step"], point["valid_loss"]) for point in r["history"]]
                for r in rows
                if r["arm"] == arm and r["status"] == "finished" and r.get("history")
            ]
            for arm in arms or study.arms
        }
        histories = {arm: found for arm, found in histories.items() if found}
        if all(len(one) < 2 for found in histories.values() for one in found):
            return dots(figure, tuple(histories))(study, rows)

        def draw(axes: Axes) -> None:
            looks = styles(list(histories))
            for arm, history in histories.items():
                steps, losses = [step for step, _ in history[0]], np.array(history)[:, :, 1]
                axes.plot(steps, losses.mean(0), label=arm, **looks[arm])
                axes.fill_between(steps, losses.min(0), losses.max(0), alpha=0.15, color=looks[arm]["color"])
            axes.set(
                xlabel="step", ylabel="held-out loss (nats)", title=f"{study.name}: mean and range over seeds"
            )
            final = [history[i][-1][1] for history in histories.values() for i in range(len(history))]
            first = [history[i][0][1] for history in histories.values() for i in range(len(history))]
            if max(first) > 20 * min(final):
                axes.set_yscale("log")
            legend(axes)

        return Section("", figure, draw, histories)

    return make


def dots(figure: str, arms: Sequence[str] | None = None) -> SectionMaker:
    """The metric of every arm with its 95 % interval, one line per arm."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        contrasts = Contrasts(study, rows)
        found = {arm: one for arm in arms or study.arms if (one := contrasts.arm(arm)) is not None}

        def draw(axes: Axes) -> None:
            names = list(found)[::-1]  # the first on top
            half = [np.nan_to_num(found[name].half) for name in names]
            axes.errorbar(
                [found[name].mean for name in names], range(len(names)), xerr=half, fmt="o", capsize=3
            )
            axes.set_yticks(range(len(names)), names)
            axes.set(xlabel=study.metric.replace("_", " "), title=f"{study.name}: mean and 95 % interval")
            axes.grid(axis="x", alpha=0.3)

        return Section("", figure, draw, {arm: (one.mean, one.half) for arm, one in found.items()})

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
            f"Fits of L(N) = a N^-b + c, N in {xlabel}, Huber loss of log residuals, 95 % intervals by bootstrap of "
            "the runs of each size. Last column: relative error of the mean loss at the largest size, from a fit to "
            "all smaller ones."
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
            ticks(axes, (N for pairs in measured.values() for N, _ in pairs))
            legend(axes)

        text = f"{markdown_table(header, lines)}\n\n{note}" if lines else ""
        laws = {series: found.constants for series, found in fitted.items()}
        return Section(text, figure, draw, [measured, laws])

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
        contrasts = Contrasts(study, rows, metric)
        found: dict[str, list[tuple[Point, Estimate]]] = {}
        for arm in study.arms:
            mean = contrasts.arm(arm)
            row = next((row for row in rows if row["arm"] == arm and row["status"] == "finished"), None)
            point = None if row is None or mean is None else place(arm, row)
            if point is not None and mean is not None:
                found.setdefault(point.series, []).append((point, mean))

        def draw(axes: Axes) -> None:
            for i, (series, places) in enumerate(found.items()):
                places = sorted(places, key=lambda pair: pair[0].x)
                x, y = [point.x for point, _ in places], [y.mean for _, y in places]
                half = [0.0 if math.isnan(y.half) else y.half for _, y in places]
                axes.errorbar(
                    x, y, half, fmt="osD^"[i // 10 % 4] + ("-" if joined else ""), color=f"C{i % 10}",
                    capsize=3, markersize=4, label=series or None,
                )  # fmt: skip
                for below, (point, mean) in zip(itertools.cycle((False, True)), places, strict=False):
                    if point.label:
                        axes.annotate(
                            point.label,
                            (point.x, mean.mean),
                            (4, -10 if below else 4),
                            textcoords="offset points",
                            fontsize="x-small",
                        )
            axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, title=study.name)
            if xscale == "log":
                ticks(axes, (point.x for places in found.values() for point, _ in places))
            if any(found):
                legend(axes)

        plotted = {
            series: [(*point, mean.mean, mean.half) for point, mean in places]
            for series, places in found.items()
        }
        return Section("", figure, draw, plotted)

    return make
