"""How figures look: hues and lines of arms, legends, ticks of logarithmic axes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def styles(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One hue per family, the first word of an arm's name, and one kind of line per arm of a family."""
    import matplotlib.pyplot as plt

    families: dict[str, list[str]] = {}
    for arm in arms:
        families.setdefault(re.split(r"[ ,]", arm)[0], []).append(arm)
    kinds = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
    return {
        arm: {"color": plt.get_cmap("tab10")(hue % 10), "linestyle": kinds[i % len(kinds)]}
        for hue, members in enumerate(families.values())
        for i, arm in enumerate(members)
    }


def legend(axes: Axes) -> None:
    """Inside the axes if it has few entries, else beside them, where it hides nothing."""
    if len(axes.get_legend_handles_labels()[1]) > 4:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        axes.legend(fontsize="small")


def ticks(axes: Axes, x: Iterable[float]) -> None:
    """Readable ticks of a logarithmic x axis: at the plotted values if they are few, else at 1, 2 and 5."""
    from matplotlib import ticker

    found = sorted(set(x))
    apart = all(b > 1.25 * a for a, b in itertools.pairwise(found))
    axes.xaxis.set_major_locator(
        ticker.FixedLocator(found) if len(found) <= 7 and apart else ticker.LogLocator(subs=(1, 2, 5))
    )
    big = found and found[0] >= 1000
    axes.xaxis.set_major_formatter(
        ticker.EngFormatter(sep=" ", places=None if not apart else 0)
        if big
        else ticker.FuncFormatter(lambda value, _: f"{value:.3g}")
    )
    axes.xaxis.set_minor_locator(ticker.NullLocator())
