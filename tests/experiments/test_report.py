"""Tables of known rows; every committed README matches its results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bitnet_experiments import report
from bitnet_experiments.sections import (
    Point,
    arms_table,
    markdown_table,
    measures_table,
    pairs_table,
    points,
    size_law,
)
from bitnet_experiments.study import Study, load_study, read_results, study_names

pytestmark = pytest.mark.extended


def row(arm: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    history = [{"step": 1, "valid_loss": loss + 1}, {"step": 2, "valid_loss": loss}]
    fields = {
        "run": f"{arm}-seed{seed}", "arm": arm, "seed": seed, "status": "finished", "valid_loss": loss,
        "parameters": 1234, "wall_seconds": 2.0, "history": history, "commit": "abc", "hardware": "h", "jax": "0",
    }  # fmt: skip
    return fields | more


ROWS = [
    row("float32", 0, 1.0),
    row("float32", 1, 2.0),
    row("float32", 2, 3.0),
    row("ternary", 0, 1.5, valid_loss=1.5),
    row("ternary", 1, 2.6),
    row("ternary", 2, 9.0, status="diverged"),
    row("broken", 0, 0.0, status="failed", valid_loss=None),
    row("gone", 0, 0.0),
]


def write(study: Study, rows: list[dict[str, Any]]) -> None:
    study.results.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_tables_figures_and_pages(study: Study) -> None:
    write(study, ROWS)
    (study.folder / "README.md").write_text(
        f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
    )
    report.report(study, study.results, study.folder)
    text = (study.folder / "README.md").read_text()
    assert text.startswith("# Title\n\nbefore\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "| float32 | 3 | 2.0000 ± 2.4841 |  |  | 1,234 | 2 |" in text
    # differences 0.5 and 0.6: t(0.975, 1) = 12.7062, standard error 0.05
    assert "| ternary | 2, 1 diverged | 2.0500 ± 6.9884 | 0.5500 ± 0.6353 |" in text
    assert "| broken | 0, 1 failed |" in text
    assert "gone" not in text
    assert "Command: `bitnet-jax sweep toy`." in text
    assert (study.folder / "curves.png").stat().st_size > 1000
    page = (study.folder / "report.html").read_text()
    assert "<h1>Title</h1>" in page
    assert "<td>ternary</td>" in page
    assert 'src="data:image/png;base64,' in page
    assert 'src="curves.png"' not in page


def test_points_are_means_with_error_bars(study: Study) -> None:
    import matplotlib.pyplot as plt

    def place(arm: str, row: Any) -> Point | None:
        return Point(row["parameters"], "all", arm) if arm != "ternary" else None

    figure, axes = plt.subplots()
    section = points("x", place, xlabel="parameters")(study, ROWS)
    assert section.draw is not None
    section.draw(axes)
    ((line, _, bars),) = axes.containers
    assert line.get_xydata().tolist() == [[1234.0, 2.0]]
    ((low, high),) = bars[0].get_segments()
    assert (high - low)[1] / 2 == pytest.approx(2.4841, abs=1e-4)
    plt.close(figure)


def test_arms_are_compared_with_the_named_arm(study: Study) -> None:
    write(study, ROWS)
    named = arms_table("parameters", against=lambda arm: "ternary")(study, ROWS).markdown
    assert "| float32 | 3 | 2.0000 ± 2.4841 | -0.5500 ± 0.6353 (ternary) |" in named
    assert "| ternary | 2, 1 diverged | 2.0500 ± 6.9884 |  |  | 1234 |" in named


def test_a_pipe_character_in_a_cell_is_escaped() -> None:
    assert markdown_table(["a"], [["mean|W|"]]).splitlines()[2] == r"| mean\|W\| |"


def test_measures_have_intervals_and_empty_fields_are_omitted(study: Study) -> None:
    lines = measures_table("valid_loss", "nothing")(study, ROWS).markdown.splitlines()
    assert lines[0] == "| arm | valid_loss |"
    assert lines[2:] == ["| float32 | 2.0000 ± 2.4841 |", "| ternary | 2.0500 ± 6.9884 |"], "broken has none"


def test_pairs_list_both_arms(study: Study) -> None:
    lines = pairs_table(("ternary", "float32"), ("broken", "float32"))(study, ROWS).markdown.splitlines()
    assert lines[0] == "| difference of valid_loss | mean | detectable |"
    assert lines[2].startswith("| ternary minus float32 | 0.5500 ± 0.6353 | ")
    assert len(lines) == 3, "a pair without common seeds is omitted"


def test_a_scaling_law_fitted_to_the_sizes_of_a_series(study: Study) -> None:
    """Two series that follow a law exactly, and one with too few sizes for a fit."""
    sizes = (1.0, 2.0, 4.0, 8.0, 16.0)
    arms = {f"{name} {size:g}": {} for name in ("whole", "short") for size in sizes}
    rows = [
        row(arm, seed, 0.5 * float(arm.split()[1]) ** -0.3 + 1.0)
        for arm in arms
        for seed in (0, 1)
        if arm.startswith("whole") or float(arm.split()[1]) < 8
    ]
    laws = dataclasses.replace(study, arms=arms, baseline="whole 1", small_arms=None)
    section = size_law(
        "size", lambda arm, r: Point(float(arm.split()[1]), arm.split()[0]), xlabel="millions"
    )(laws, rows)
    assert "| whole | 0.5 (0.5 to 0.5) | 0.3 (0.3 to 0.3) | 1 (1 to 1) | " in section.markdown
    assert "0.00% |" in section.markdown
    assert "short" not in section.markdown


def test_the_index_of_studies(study: Study) -> None:
    write(study, ROWS)
    (line,) = report.index([study]).splitlines()[2:]
    assert line.startswith(
        "| [Does a toy learn?](studies/toy/README.md) | nobody | open | ternary: 0.5500 ± 0.6353 |"
    )
    assert line.endswith("| `bitnet-jax sweep toy` | 0.0 h, 5 of 6 runs |")
    named = dataclasses.replace(study, effect=lambda study, rows: f"{len(rows)} rows")
    assert "| 8 rows |" in report.index([named])


def test_errors_name_what_is_missing(study: Study) -> None:
    with pytest.raises(ValueError, match="has no results; run: bitnet-jax sweep toy"):
        report.report(study, study.results, study.folder)
    with pytest.raises(ValueError, match="README without"):
        report.replaced("no markers", "text")


# Bootstrapping the intervals of the scaling study's fits takes most of a minute.
SLOW_STUDIES = {"scaling"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_STUDIES)) for name in study_names()],
)
def test_every_committed_readme_matches_its_results(name: str) -> None:
    study = load_study(name)
    readme = (study.folder / "README.md").read_text()
    assert report.BEGIN in readme, "a marker for the tables"
    if study.results.is_file():
        rows = read_results(study.results)
        text = report.text_of(study, rows, report.sections(study, rows))
        assert report.replaced(readme, text) == readme, f"run: bitnet-jax report {name}"


def test_the_committed_index_matches_its_studies() -> None:
    text = report.INDEX.read_text()
    table = report.index([load_study(name) for name in study_names()])
    assert report.replaced(text, table) == text, "run: bitnet-jax report --all"
    for name in study_names():
        assert f"(studies/{name}/README.md)" in text
        assert Path(report.STUDIES / name / "README.md").is_file()
