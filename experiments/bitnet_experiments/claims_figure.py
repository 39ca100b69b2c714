"""The figure of a study's claims: each effect with its interval, over the effects that agree with the claim."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import Section
from bitnet_experiments.verdicts import Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"holds": "tab:green", "other size": "tab:olive", "contradicted": "tab:red", "undecided": "0.5"}


def claims_figure(findings: Sequence[Finding]) -> Section | None:
    """One row per claim, each with its own scale; None if no effect has an interval."""
    shown = [
        (claim, effect, outcome)
        for claim, effect, outcome in findings
        if effect is not None and not math.isnan(effect.low)
    ]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        figure = axes.get_figure(root=True)
        assert figure is not None
        axes.remove()
        figure.set_size_inches(7, 0.4 + 0.75 * len(shown))
        rows = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for row, (claim, effect, outcome) in zip(rows, shown, strict=True):
            low, high = agreeing(claim)
            ends = [effect.low, effect.high, 0.0, *(end for end in (low, high) if math.isfinite(end))]
            margin = 0.1 * (max(ends) - min(ends))
            first, last = min(ends) - margin, max(ends) + margin
            width = 0.006 * (last - first)  # of a range without width
            row.axvspan(
                max(low - width, first), min(high + width, last), color="tab:blue", alpha=0.2, linewidth=0
            )
            row.axvline(0, color="0.7", linewidth=0.8)
            row.plot([effect.low, effect.high], [0, 0], color=COLOURS[outcome], linewidth=2)
            row.plot(effect.mean, 0, "o", color=COLOURS[outcome])
            row.set(xlim=(first, last), ylim=(-1, 1))
            row.set_yticks([0], [textwrap.fill(claim.says, 38)], fontsize="x-small")
            row.tick_params(axis="x", labelsize="x-small")
            row.text(1.01, 0.5, outcome, transform=row.transAxes, va="center", fontsize="x-small")
            for side in ("top", "right", "left"):
                row.spines[side].set_visible(False)

    plotted = [
        (claim.says, claim.rule, effect.mean, effect.low, effect.high, outcome)
        for claim, effect, outcome in shown
    ]
    return Section("", "claims", draw, plotted)


def agreeing(claim: Claim) -> tuple[float, float]:
    """The effects that agree with a claim, infinite where it sets no bound."""
    if claim.between is not None:
        return claim.between
    if claim.equivalent is not None:
        return -claim.equivalent, claim.equivalent
    low = -math.inf if claim.greater_than is None else claim.greater_than
    return low, math.inf if claim.less_than is None else claim.less_than
