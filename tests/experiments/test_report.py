"""Tables of known rows; every committed README matches its results."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bitnet_experiments import report, verdicts
from bitnet_experiments.claims import Claim
from bitnet_experiments.compare import compare
from bitnet_experiments.pages import replaced
from bitnet_experiments.sections import (
    Point,
    arms_table,
    curves,
    markdown_table,
    measures_table,
    pairs_table,
    points,
    size_law,
)
from bitnet_experiments.study import Study, load_study, read_results, study_names
from bitnet_jax.cli.main import main

pytestmark = pytest.mark.extended


@pytest.fixture
def study(study: Study) -> Study:
    claim = Claim(says="ternary is 0.5 above float", contrast=("ternary", "float32"), between=(0.5, 0.5))
    return dataclasses.replace(study, claims=(claim,), effect="")


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
    """Rows with the settings that the study has now, where it has the arm."""
    settings = [
        {"settings_hash": study.settings_hash(r["arm"], r["seed"])} if r["arm"] in study.arms else {}
        for r in rows
    ]
    study.results.write_text("".join(json.dumps(s | r) + "\n" for r, s in zip(rows, settings, strict=True)))


def test_tables_figures_and_pages(study: Study) -> None:
    write(study, ROWS)
    markers = "\nold\n".join(report.VERDICT) + "\n\nbefore\n\n" + "\nold\n".join(report.TABLE)
    (study.folder / "README.md").write_text(f"# Title\n\n{markers}\n\nafter\n")
    report.report(study, study.results, study.folder)
    text = (study.folder / "README.md").read_text()
    assert "<!-- end of verdict -->\n\nbefore\n" in text
    # one degree of freedom is left: too few runs for a pooled residual that excludes 0
    assert "| ternary is 0.5 above float | 0.5 | 0.5500 ± 0.6353 | undecided |" in text
    assert (
        "**Verdict: open.** One claim: undecided. An analogue: language modelling here, translation in the source."
        in text
    )
    assert json.loads((study.folder / "verdict.json").read_text())["claims"][0]["high"] == 1.18531
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert "| float32 | 3 | 2.0000 ± 2.4841 |  |  | 1,234 | 2 |" in text
    # residuals +-0.025 with 5 - 2 - 3 + 1 = 1 degree of freedom: error 0.05, t(0.975, 1) = 12.7062
    assert "| ternary | 2, 1 diverged | 2.0500 ± 6.9884 | 0.5500 ± 0.6353 |" in text
    assert "| broken | 0, 1 failed |" in text
    assert "gone" not in text
    assert "Command: `bitnet-jax sweep toy`. Measured at commits abc, on h, jax 0." in text
    assert (study.folder / "curves.png").stat().st_size > 1000
    page = (study.folder / "report.html").read_text()
    assert '<h1 id="title">Title</h1>' in page
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
    assert "broken minus" not in "".join(lines), "a pair without a finished run is omitted"


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
    laws = dataclasses.replace(study, arms=arms, baseline="whole 1", small_arms=None, claims=())
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
        "| [Does a toy learn?](studies/toy/README.md) | open (analogue) | ternary minus float32: 0.5500 ± 0.6353 |"
    )
    assert line.endswith("| `bitnet-jax sweep toy` | 0.0 h, 5 of 6 runs |")
    named = dataclasses.replace(study, effect=lambda study, rows: f"{len(rows)} rows", redo="why")
    assert "| open (analogue, to be measured again) | 8 rows |" in report.index([named])
    assert "| broken minus float32" not in report.index([dataclasses.replace(study, effect="broken")])


def test_errors_name_what_is_missing(study: Study) -> None:
    with pytest.raises(ValueError, match="has no results; run: bitnet-jax sweep toy"):
        report.report(study, study.results, study.folder)
    with pytest.raises(ValueError, match="README without"):
        replaced("no markers", "text", *report.TABLE)


def fresh(study: Study, name: str, loss: float, **more: Any) -> dict[str, Any]:
    arm, seed = study.runs()[name]
    return row(arm, seed, loss, overrides=study.overrides(arm, seed), **more)


def test_the_check_finds_the_first_difference(study: Study) -> None:
    rows = [
        fresh(study, f"{arm}-seed{seed}", 1.0 + seed) for arm in ("float32", "ternary") for seed in (0, 1)
    ]
    write(study, rows)
    report.report(study, study.results, study.folder)
    assert report.check(study) == ([], [])
    write(study, [*rows[:-1], rows[-1] | {"valid_loss": 2.1}])
    differences, _ = report.check(study)
    assert differences[0].startswith("toy/README.md:4: got '**Verdict")
    assert differences[1].startswith("toy/verdict.json:")
    write(study, rows)
    changed = [fresh(study, "float32-seed0", 1.0, history=[{"step": 1, "valid_loss": 9.0}] * 2), *rows[1:]]
    write(study, changed)
    assert report.check(study)[0] == ["toy/curves.png shows other values than the rows give"]


def test_the_command_exits_with_the_outcome_of_the_check(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        fresh(study, f"{arm}-seed{seed}", 1.0 + seed) for arm in ("float32", "ternary") for seed in (0, 1)
    ]
    write(study, rows)
    own = load_study(str(study.folder))  # as study.py has it, without the claim added above
    report.report(own, own.results, own.folder)
    assert main(["report", str(study.folder), "--check"]) == 0
    write(study, rows[:-1])
    assert main(["report", str(study.folder), "--check"]) == 1
    assert "error: toy/README.md:" in capsys.readouterr().err
    assert main(["report", str(study.folder), "--check", "--workdir", "x"]) != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "abc-dirty"}, "1 of 4 rows are of uncommitted code, such as ternary-seed1: abc-dirty"),
        ({"hardware": "other"}, "rows of 2 machines: h, other"),
        (
            {"settings_hash": "another"},
            "1 of 4 rows were made with other settings than the study has now, such as ternary-seed1",
        ),
    ],
)
def test_rows_that_cannot_be_compared_fail_the_check(
    study: Study, change: dict[str, Any], message: str
) -> None:
    rows = [
        fresh(study, f"{arm}-seed{seed}", 1.0 + seed) for arm in ("float32", "ternary") for seed in (0, 1)
    ]
    write(study, [*rows[:-1], rows[-1] | change])
    report.report(study, study.results, study.folder)
    assert report.check(study) == ([f"toy: {message}"], [])
    redo = dataclasses.replace(study, redo="the machine is gone")
    report.report(redo, study.results, study.folder)
    assert report.check(redo) == ([], [f"toy: {message}"])
    assert "**To be measured again:** the machine is gone." in (study.folder / "README.md").read_text()


def test_two_studies_are_compared_by_their_common_arms(study: Study, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = dataclasses.replace(
        study,
        folder=tmp_path / "other",
        arms={"ternary": {}, "few": {}},
        baseline="few",
        small_arms=None,
        claims=(),
    )
    write(study, [one | {"config_hash": one["run"]} for one in ROWS])
    again = [row("few", 0, 4.0, config_hash="float32-seed0"), row("few", 1, 6.0), row("ternary", 0, 2.0)]
    write(other, again)
    lines = compare(study, other).splitlines()
    assert lines[2].startswith(
        "| toy | Does a toy learn? | open (analogue) | ternary minus float32: 0.5500 ± 0.6353 |"
    )
    # error^2 = 1/3 + 1, df = (4/3)^2 / ((1/3)^2 / 2 + 1) = 1.684: t(0.975) = 5.176
    assert lines[7] == "| float32 / few | 2.0000 ± 2.4841 | 5.0000 ± 12.7062 | -3.0000 ± 5.9770 |"
    assert lines[8] == "| ternary | 2.0500 ± 6.9884 | 2.0000 (one seed) | 0.0500 (one seed) |"
    with pytest.raises(ValueError, match="studies of valid_loss and valid_error"):
        compare(study, dataclasses.replace(other, metric="valid_error"))


def test_a_figure_without_curves_shows_the_arms(study: Study) -> None:
    """Runs that were evaluated once have no curve: an empty panel would say nothing."""
    import matplotlib.pyplot as plt

    rows = [one | {"history": one["history"][-1:]} for one in ROWS]
    section = curves()(study, rows)
    assert section.draw is not None
    figure, axes = plt.subplots()
    section.draw(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ternary", "float32"]
    plt.close(figure)


@pytest.mark.parametrize("name", study_names())
def test_every_committed_study_agrees_with_its_results(name: str) -> None:
    """Verdict, tables, the values in figures, and that the rows may be compared."""
    assert report.check(load_study(name))[0] == [], f"run: bitnet-jax report {name}"


@pytest.mark.parametrize("name", study_names())
def test_a_study_without_most_of_its_rows_has_no_effects(name: str) -> None:
    study = load_study(name)
    found = [verdicts.judge(study, rows) for rows in ([], read_results(study.results)[:1])]
    assert found[0].name in ("open", "own finding")
    assert all(finding.outcome == "undecided" for one in found for finding in one.findings)


@pytest.mark.parametrize("name", study_names())
def test_every_interval_in_the_words_of_a_page_is_in_its_tables(name: str) -> None:
    """`1.6 ± 0.7` in the discussion must be some generated `1.5900 ± 0.6770`, rounded; signs may differ."""
    text = (report.STUDIES / name / "README.md").read_text()
    written = text
    for begin, end in (report.VERDICT, report.TABLE):
        head, _, rest = written.partition(begin)
        written = head + rest.partition(end)[2]
    number = r"(\d+\.?\d*)\s+±\s+(\d+\.?\d*)"
    known = [(float(a), float(b)) for a, b in re.findall(number, text.replace(written, ""))]
    for mean, half in re.findall(number, written):
        digits = [len(part.partition(".")[2]) for part in (mean, half)]
        assert any(f"{a:.{digits[0]}f}" == mean and f"{b:.{digits[1]}f}" == half for a, b in known), (
            f"{mean} ± {half}"
        )


def test_the_committed_index_matches_its_studies() -> None:
    assert report.check_index() == [], "run: bitnet-jax report --all"
    text = report.INDEX.read_text()
    for name in study_names():
        assert f"(studies/{name}/README.md)" in text
