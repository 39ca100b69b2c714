"""Which bits are best at each size of the model file and each amount of text: a table, and the map of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitnet_experiments.contrasts import Contrasts
from bitnet_experiments.intervals import Estimate
from bitnet_experiments.sections import Section, SectionMaker, markdown_table
from bitnet_experiments.study import Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Place(NamedTuple):
    """Where an arm stands on the map: bytes of its model file and of the text it is trained on, and bits per weight."""

    file: int
    text: int
    bits: float


class Cell(NamedTuple):
    """The arms of one file size and amount of text, measured so far."""

    losses: dict[float, Estimate]  # by bits
    best: float  # bits of the lowest mean
    above: dict[float, Estimate]  # by bits, without the best: mean loss above that of the best

    @property
    def equal(self) -> list[float]:
        """Bits that cannot be told from the best: their difference's 95 % interval contains 0."""
        return [bits for bits, one in self.above.items() if one.mean <= one.half]

    @property
    def profile(self) -> list[tuple[float, float, float]]:
        """(bits, loss above the best, half of its 95 % interval), by bits."""
        others = [(bits, one.mean, one.half) for bits, one in self.above.items()]
        return sorted([(self.best, 0.0, 0.0), *others])


def cells(study: Study, rows: Sequence[Row], place: Callable[[str], Place]) -> dict[tuple[int, int], Cell]:
    """(file, text) -> its cell, for those where at least two arms have finished runs."""
    contrasts, arms = Contrasts(study, rows), {place(arm): arm for arm in study.arms}
    found = {}
    for corner in dict.fromkeys((where.file, where.text) for where in arms):
        members = {where.bits: arm for where, arm in arms.items() if where[:2] == corner}
        losses = {bits: one for bits, arm in members.items() if (one := contrasts.arm(arm)) is not None}
        if len(losses) < 2:
            continue
        best = min(losses, key=lambda bits: losses[bits].mean)
        above = {bits: contrasts.difference(members[bits], members[best]) for bits in losses if bits != best}
        found[corner] = Cell(losses, best, {bits: one for bits, one in above.items() if one is not None})
    return found


def map_table(place: Callable[[str], Place]) -> SectionMaker:
    """One line per cell: the loss at each number of bits, the best in bold, and which others may be as good."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        found = cells(study, rows, place)
        columns = sorted({place(arm).bits for arm in study.arms})
        lines = [
            [
                f"{file / 1024:g} KiB",
                f"{text / 2**20:g} MiB",
                *(
                    ("**{}**" if bits == cell.best else "{}").format(cell.losses[bits])
                    if bits in cell.losses
                    else ""
                    for bits in columns
                ),
                ", ".join(f"{bits:g}" for bits in sorted(cell.equal)) or "none",
            ]
            for (file, text), cell in found.items()
        ]
        header = ["file", "text", *(f"{bits:g} bits" for bits in columns), "<not told from the best"]
        return Section(
            f"{markdown_table(header, lines)}\n\nLowest mean in bold. Last column: bits whose difference to it has a "
            "95 % interval with 0 in it, without a correction for the number of differences."
            if lines
            else ""
        )

    return make


def map_figure(figure: str, place: Callable[[str], Place]) -> SectionMaker:
    """Text against file size; in each cell the loss above the best over bits, with 95 % intervals of the difference."""

    def make(study: Study, rows: Sequence[Row]) -> Section:
        found = cells(study, rows, place)
        if not found:
            return Section("")
        texts = sorted({text for _, text in found})
        files = sorted({file for file, _ in found})
        bits = sorted({place(arm).bits for arm in study.arms})
        top = 1.15 * max(one.mean for cell in found.values() for one in cell.above.values())

        def draw(axes: Axes) -> None:
            axes.set(
                xlim=(0, len(texts)), ylim=(0, len(files)), title=study.name,
                xlabel="bytes of training text", ylabel="bytes of the model file",
            )  # fmt: skip
            axes.set_xticks(np.arange(len(texts)) + 0.5, [f"{text / 2**20:g} MiB" for text in texts])
            axes.set_yticks(np.arange(len(files)) + 0.5, [f"{file / 1024:g} KiB" for file in files])
            for (file, text), cell in found.items():
                corner = texts.index(text) + 0.17, files.index(file) + 0.17
                inset = axes.inset_axes((*corner, 0.78, 0.74), transform=axes.transData)
                order, means, halves = zip(*cell.profile, strict=True)
                positions = [bits.index(one) for one in order]
                colours = [
                    "tab:green" if one == cell.best else "tab:olive" if one in cell.equal else "0.6"
                    for one in order
                ]
                inset.plot(positions, means, color="0.8", zorder=0)
                inset.errorbar(
                    positions,
                    means,
                    np.nan_to_num(halves),
                    fmt="none",
                    ecolor="0.5",
                    elinewidth=0.8,
                    capsize=2,
                )
                inset.scatter(positions, means, c=colours, s=16, zorder=3)
                inset.set_ylim(-0.12 * top, top)
                inset.set_xticks(range(len(bits)), [f"{one:g}" for one in bits])
                inset.tick_params(labelsize="xx-small", length=2)
                inset.set_title(f"best: {cell.best:g} bits", fontsize="x-small", pad=2)

        plotted = {f"{file} {text}": [*map(list, cell.profile)] for (file, text), cell in found.items()}
        return Section(
            "Loss above the best (nats per byte) over bits per weight: green the best, olive those not told from it.",
            figure, draw, plotted,
        )  # fmt: skip

    return make
