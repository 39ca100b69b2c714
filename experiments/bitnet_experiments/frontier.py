"""Quality against cost in one figure: every arm a point, and the Pareto front through the best of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitnet_experiments.contrasts import Contrasts
from bitnet_experiments.intervals import Estimate
from bitnet_experiments.sections import Section, SectionMaker
from bitnet_experiments.study import Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

MARKERS = "osD^v"
# Where a label may stand around its point, in points; the nearest free place is taken.
DISTANCES = (8, 12, 16, 22, 30, 40, 52)
ANGLES = (45, -45, 135, -135, 0, 180, 20, -20, 160, -160, 90, -90)


class Mark(NamedTuple):
    """How an arm is drawn: its cost, the family that gives the hue, the kind that gives the marker, its label."""

    x: float
    family: str
    kind: str
    label: str


class Placed(NamedTuple):
    mark: Mark
    loss: Estimate


def frontier(
    figure: str, place: Callable[[str, Row], Mark], *, xlabel: str, ylabel: str = "held-out loss (nats)"
) -> SectionMaker:
    """The metric of every arm against its cost, both better when smaller, with 95 % intervals over seeds.

    Args:
      place: (arm, one of its rows) -> how it is drawn. Of arms with one label, only the best carries it.
    """

    def make(study: Study, rows: Sequence[Row]) -> Section:
        contrasts, found = Contrasts(study, rows), []
        for arm in study.arms:
            loss = contrasts.arm(arm)
            if loss is not None:
                row = next(row for row in rows if row["arm"] == arm and row["status"] == "finished")
                found.append(Placed(place(arm, row), loss))

        def draw(axes: Axes) -> None:
            _draw(axes, found)
            axes.set(xlabel=xlabel, ylabel=ylabel)

        return Section("", figure, draw, [(*point.mark, point.loss.mean, point.loss.half) for point in found])

    return make


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, loss) those that no other one beats in both, by cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _draw(axes: Axes, found: Sequence[Placed]) -> None:
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    families = list(dict.fromkeys(point.mark.family for point in found))
    kinds = list(dict.fromkeys(point.mark.kind for point in found))
    colours = {family: plt.get_cmap("Dark2")(i) for i, family in enumerate(families)}
    markers = dict(zip(kinds, itertools.cycle(MARKERS), strict=False))
    axes.set_xscale("log")
    axes.margins(0.2, 0.12)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    (front,) = axes.plot(
        *zip(*pareto([(point.mark.x, point.loss.mean) for point in found]), strict=True),
        color="0.7", linewidth=2, zorder=0, label="Pareto front",
    )  # fmt: skip
    for point in found:
        axes.errorbar(
            point.mark.x, point.loss.mean, np.nan_to_num(point.loss.half),
            fmt=markers[point.mark.kind], color=colours[point.mark.family], capsize=0,
            elinewidth=0.8, markersize=5, alpha=0.85,
        )  # fmt: skip
    hues = [axes.plot([], [], "o", color=colours[family], label=family)[0] for family in families]
    shapes = [axes.plot([], [], markers[kind], color="0.3", label=kind)[0] for kind in kinds]
    legend = axes.legend(handles=[front, *hues, *shapes], fontsize="x-small", ncols=2, frameon=False)
    axes.figure.canvas.draw()  # the limits and the layout are final: places of labels can be measured
    _label(axes, found, colours, [legend.get_window_extent()])


def _label(
    axes: Axes, found: Sequence[Placed], colours: Mapping[str, tuple[float, ...]], taken: list[Bbox]
) -> None:
    """Writes each label once, at its best arm, where it meets no point, no other label and nothing `taken`."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    best: dict[str, Placed] = {}
    for point in found:
        if point.mark.label not in best or point.loss.mean < best[point.mark.label].loss.mean:
            best[point.mark.label] = point
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    taken = list(taken)
    for point in found:
        (x, y), half = (point.mark.x, point.loss.mean), np.nan_to_num(point.loss.half)
        (left, low), (right, high) = axes.transData.transform([(x, y - half), (x, y + half)])
        taken.append(Bbox([[left - 1, low], [right + 1, high]]))  # the interval
        (left, low) = axes.transData.transform((x, y)) - 5
        taken.append(Bbox.from_bounds(left, low, 10, 10))  # the marker
    for point in sorted(best.values(), key=lambda point: (point.mark.x, point.loss.mean)):
        at = (point.mark.x, point.loss.mean)
        for distance, angle in itertools.product(DISTANCES, ANGLES):
            dx, dy = (distance * f(math.radians(angle)) for f in (math.cos, math.sin))
            text = axes.annotate(
                point.mark.label, at, (dx, dy), textcoords="offset points", fontsize="x-small",
                ha="left" if dx > 1 else "right" if dx < -1 else "center", va="center",
                color=colours[point.mark.family],
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if distance > 8 else None,
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(1)  # an annotation's own includes its line
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            raise ValueError(
                f"{point.mark.label}: got no free place for the label; draw fewer arms or larger axes"
            )
