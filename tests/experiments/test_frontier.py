"""The Pareto front, and the figure of the precision ladder: each label once, without overlaps."""

from __future__ import annotations

import itertools

import matplotlib
import pytest

from bitnet_experiments import report
from bitnet_experiments.frontier import pareto
from bitnet_experiments.study import load_study, read_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(3, 1.0), (1, 3.0), (2, 2.0)], [(1, 3.0), (2, 2.0), (3, 1.0)]),
        ([(1, 3.0), (2, 3.0), (3, 4.0)], [(1, 3.0)]),  # ties in loss go to the cheaper one
        ([(1, 3.0), (1, 2.0)], [(1, 2.0)]),
    ],
)
def test_the_front_contains_exactly_the_undominated_points(
    points: list[tuple[float, float]], front: list[tuple[float, float]]
) -> None:
    assert pareto(points) == front


def test_labels_of_the_ladder_occur_once_and_do_not_overlap() -> None:
    study = load_study("precision_ladder")
    (part,) = [s for s in report.sections(study, read_results(study.results)) if s.figure == "bytes"]
    assert part.draw is not None
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    part.draw(axes)
    figure.canvas.draw()
    labels = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert len(labels) == len(axes.texts)
    assert {"W32 A32", "W1.58 A8", "W1 A8", "W1 A1"} <= set(labels)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(labels.values(), 2))
    assert all(
        axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1) for box in labels.values()
    )
    plt.close(figure)
