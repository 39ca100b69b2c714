"""The report of a study, rebuilt from its results: verdict, tables, figures and an HTML page.

Writes into the study's README, between marker comments, the verdict on its claims and the sections listed in REPORT;
the figures and verdict.json next to it; and report.html, the README as one self-contained page. `check` compares all
of these with what the rows give, and the rows with what may be compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bitnet_experiments import verdicts
from bitnet_experiments.claims_figure import claims_figure
from bitnet_experiments.pages import digest, digest_of, draw, page, replaced
from bitnet_experiments.row_checks import comparable_rows, problems
from bitnet_experiments.sections import Section, arms_table, curves, markdown_table
from bitnet_experiments.study import STUDIES, Row, Study, load_study, read_results, study_names

TABLE = ("<!-- table: written by bitnet-jax report -->", "<!-- end of table -->")
VERDICT = ("<!-- verdict: written by bitnet-jax report -->", "<!-- end of verdict -->")
INDEX = STUDIES.parent / "README.md"


def command(study: Study, small: bool = False) -> str:
    return f"bitnet-jax sweep {study.name}{' --small' if small else ''}"


def sections(study: Study, rows: Sequence[Row]) -> list[Section]:
    """The study's sections; rows of arms that it no longer has are ignored."""
    rows = [row for row in rows if row["arm"] in study.arms]
    return [make(study, rows) for make in study.report or (arms_table(), curves())]


def figures(parts: Sequence[Section], found: verdicts.Verdict) -> list[Section]:
    """The sections that draw something, that of the claims among them."""
    return [part for part in (claims_figure(found.findings), *parts) if part is not None and part.figure]


def text_of(study: Study, rows: Sequence[Row], parts: Sequence[Section]) -> str:
    """Markdown of the sections, then the command and the provenance of the rows."""
    blocks = []
    for part in parts:
        if part.markdown:
            blocks.append(part.markdown)
        if part.figure:
            blocks.append(f"![{part.figure.replace('_', ' ')}]({part.figure}.png)")
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    machines = _machines(study, rows)
    versions = ", ".join(sorted({row["jax"] for row in rows}))
    small = any(row.get("small") for row in rows)
    blocks.append(
        f"Command: `{command(study, small)}`. Measured at commits {commits}, on {machines}, jax {versions}."
    )
    return "\n\n".join(blocks)


def _machines(study: Study, rows: Sequence[Row]) -> str:
    """The machines of the rows, each with its blocks if there are several."""
    blocks: dict[str, dict[str, None]] = {}
    for row in rows:
        blocks.setdefault(row["hardware"], {})[study.block_of(row["arm"])] = None
    if len(blocks) == 1 or study.block is None:
        return ", ".join(sorted(blocks))
    return ", ".join(f"{machine} ({', '.join(blocks[machine])})" for machine in sorted(blocks))


def _readme(study: Study, rows: Sequence[Row], old: str, parts: Sequence[Section]) -> str:
    found = verdicts.judge(study, rows)
    head = verdicts.markdown(study, found)
    head += "" if claims_figure(found.findings) is None else "\n\n![claims](claims.png)"
    new = replaced(old, head, *VERDICT)
    return replaced(new, text_of(study, rows, parts), *TABLE)


def _verdict_file(study: Study, rows: Sequence[Row]) -> str:
    found = verdicts.to_json(study, verdicts.judge(study, rows))
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def report(study: Study, results: Path, folder: Path) -> str:
    """Writes verdict, tables, figures and the page into `folder`; returns the Markdown of the tables.

    Raises:
      ValueError: there are no results of the study as it is, or the README has no markers.
    """
    rows = comparable_rows(study, results)
    if not rows:
        found = "only stale results" if read_results(results) else "no results"
        small = study.workdir(small=True)
        other = f" (--workdir {small} reports the small sweep)" if (small / results.name).is_file() else ""
        raise ValueError(f"{results} has {found}; run: {command(study, folder != study.folder)}{other}")
    parts = sections(study, rows)
    for part in figures(parts, verdicts.judge(study, rows)):
        draw(part, folder)
    readme = folder / "README.md"
    empty = "\n\n".join([f"# {study.question}", "\n".join(VERDICT), "\n".join(TABLE)]) + "\n"
    readme.write_text(_readme(study, rows, readme.read_text() if readme.is_file() else empty, parts))
    (folder / "verdict.json").write_text(_verdict_file(study, rows))
    linked = readme.read_text().replace("../../README.md#", "../../report.html#")
    (folder / "report.html").write_text(page(study.question, linked, folder))
    return text_of(study, rows, parts)


def check(study: Study) -> tuple[list[str], list[str]]:
    """Differences between the committed report and the rows, the first first, and notes on rows to measure again.

    Nothing is written or drawn. A study without results has nothing to compare.
    """
    measured = read_results(study.results)
    if not measured:
        return [], []
    rows = comparable_rows(study)
    wrong = [f"{study.name}: {problem}" for problem in problems(study, measured)]
    notes = wrong if study.redo else []
    differences = [] if study.redo else wrong
    parts = sections(study, rows)
    readme = study.folder / "README.md"
    old = readme.read_text() if readme.is_file() else ""
    differences += _first_difference(readme, old, _readme(study, rows, old, parts))
    file = study.folder / "verdict.json"
    written = file.read_text() if file.is_file() else ""
    differences += _first_difference(file, written, _verdict_file(study, rows))
    for part in figures(parts, verdicts.judge(study, rows)):
        if digest_of(study.folder / f"{part.figure}.png") != digest(part.plotted):
            differences.append(f"{study.name}/{part.figure}.png shows other values than the rows give")
    return differences, notes


def check_index() -> list[str]:
    """Differences between the committed table of all studies and their rows."""
    old = INDEX.read_text()
    new = replaced(old, index([load_study(name) for name in study_names()]), *TABLE)
    return _first_difference(INDEX, old, new)


def _first_difference(file: Path, old: str, new: str) -> list[str]:
    lines, expected = old.splitlines(), new.splitlines()
    for number in range(max(len(lines), len(expected))):
        got, want = (text[number] if number < len(text) else "" for text in (lines, expected))
        if got != want:
            return [f"{file.parent.name}/{file.name}:{number + 1}: got {got!r}, the rows give {want!r}"]
    return []


def index(studies: Sequence[Study]) -> str:
    """The table of all studies."""
    lines = []
    for study in studies:
        rows = comparable_rows(study)
        found = verdicts.judge(study, rows)
        done, total = len({row["run"] for row in rows} & set(study.runs())), len(study.runs())
        hours = sum(row["wall_seconds"] for row in rows) / 3600
        lines.append(
            [
                f"[{study.question}](studies/{study.name}/README.md)",
                verdicts.label(study, found),
                verdicts.effect(study, rows, found),
                study.paper_effect,
                study.source,
                f"`{command(study)}`",
                f"{hours:.1f} h" if done == total else f"{hours:.1f} h, {done} of {total} runs",
            ]
        )
    header = ["question", "<verdict", "<effect here", "<effect there", "<source", "<command", "cost"]
    return markdown_table(header, lines)


def report_all() -> Path:
    """Reports every study with results and rewrites the table of all studies; returns the path of its HTML page."""
    studies = [load_study(name) for name in study_names()]
    for study in studies:
        if study.results.is_file():
            report(study, study.results, study.folder)
    INDEX.write_text(replaced(INDEX.read_text(), index(studies), *TABLE))
    html = INDEX.with_name("report.html")
    links = INDEX.read_text()
    for study in studies:
        if study.results.is_file():
            links = links.replace(
                f"](studies/{study.name}/README.md)", f"](studies/{study.name}/report.html)"
            )
    html.write_text(page("Experiments", links, INDEX.parent))
    return html
