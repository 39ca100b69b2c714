"""Tables, figures and an HTML page of a study, rebuilt from its results.

Writes the sections listed in the study's REPORT: tables between the marker comments of its README, figures next to it,
and report.html, the README as one self-contained page.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from bitnet_experiments.intervals import interval
from bitnet_experiments.sections import Section, arms_table, curves, difference, markdown_table
from bitnet_experiments.study import STUDIES, Row, Study, load_study, read_results, study_names
from bitnet_jax.optional_packages import missing_package

BEGIN, END = "<!-- table: written by bitnet-jax report -->", "<!-- end of table -->"
INDEX = STUDIES.parent / "README.md"


def command(study: Study) -> str:
    return f"bitnet-jax sweep {study.name}"


def sections(study: Study, rows: Sequence[Row]) -> list[Section]:
    """The study's sections; rows of arms that it no longer has are ignored."""
    rows = [row for row in rows if row["arm"] in study.arms]
    return [make(study, rows) for make in study.report or (arms_table(), curves())]


def text_of(study: Study, rows: Sequence[Row], parts: Sequence[Section]) -> str:
    """Markdown of the sections, with the command below each table, and the provenance of the rows."""
    blocks = []
    for part in parts:
        if part.markdown:
            blocks += [part.markdown, f"Command: `{command(study)}`."]
        if part.figure:
            blocks.append(f"![{part.figure.replace('_', ' ')}]({part.figure}.png)")
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    machines = ", ".join(sorted({row["hardware"] for row in rows}))
    versions = ", ".join(sorted({row["jax"] for row in rows}))
    blocks.append(f"Measured at commits {commits}, on {machines}, jax {versions}.")
    return "\n\n".join(blocks)


def draw(part: Section, folder: Path) -> None:
    """Writes the figure of a section into a folder. Raises ValueError: matplotlib is not installed."""
    if part.draw is not None:
        try:
            import matplotlib
        except ImportError as error:
            raise ValueError(missing_package("matplotlib")) from error
        matplotlib.use("Agg")  # headless; must precede the import of pyplot
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        part.draw(axes)
        figure.savefig(folder / f"{part.figure}.png", dpi=120)
        plt.close(figure)


def replaced(old: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """`old` with `text` between its markers. Raises ValueError: no markers."""
    head, found, rest = old.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"got a README without {begin} and {end}; put them where the tables belong")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def page(title: str, text: str, folder: Path) -> str:
    """Markdown as one HTML page, with the figures in `folder` embedded.

    Raises:
      ValueError: the package markdown is not installed.
    """
    try:
        import markdown
    except ImportError as error:
        raise ValueError(missing_package("markdown")) from error

    def embed(match: re.Match[str]) -> str:
        file = folder / html.unescape(match[1])
        if not file.is_file():
            return match[0]
        return f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"'

    body = re.sub(
        r'src="([^":]+\.png)"', embed, markdown.markdown(text, extensions=["tables", "fenced_code"])
    )
    style = (
        "body{max-width:60em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:.2em .6em;border-bottom:1px solid #ccc}code{background:#eee}"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def report(study: Study, results: Path, folder: Path) -> str:
    """Writes tables, figures and the page into `folder`; returns the Markdown of the tables.

    Raises:
      ValueError: there are no results, or the README has no markers.
    """
    rows = read_results(results)
    if not rows:
        raise ValueError(f"{results} has no results; run: {command(study)}")
    parts = sections(study, rows)
    for part in parts:
        draw(part, folder)
    text = text_of(study, rows, parts)
    readme = folder / "README.md"
    old = readme.read_text() if readme.is_file() else f"# {study.question}\n\n{BEGIN}\n{END}\n"
    readme.write_text(replaced(old, text))
    (folder / "report.html").write_text(page(study.question, readme.read_text(), folder))
    return text


def effect(study: Study, rows: Sequence[Row]) -> str:
    """The study's answer as a short text: a paired difference with its interval, or the text from EFFECT."""
    if not rows or not study.effect:
        return ""
    if callable(study.effect):
        return study.effect(study, rows)
    differences = difference(study, rows, study.effect)
    return f"{study.effect}: {interval(differences)}" if differences else ""


def index(studies: Sequence[Study]) -> str:
    """The table of all studies."""
    lines = []
    for study in studies:
        rows = read_results(study.results)
        done, total = len({row["run"] for row in rows} & set(study.runs())), len(study.runs())
        hours = sum(row["wall_seconds"] for row in rows) / 3600
        lines.append(
            [
                f"[{study.question}](studies/{study.name}/README.md)",
                study.source,
                study.verdict,
                effect(study, rows) or "",
                study.paper_effect,
                f"`{command(study)}`",
                f"{hours:.1f} h" if done == total else f"{hours:.1f} h, {done} of {total} runs",
            ]
        )
    header = ["question", "<source", "<verdict", "<effect here", "<effect there", "<command", "cost"]
    return markdown_table(header, lines)


def report_all() -> Path:
    """Reports every study with results and rewrites the table of all studies; returns its path."""
    studies = [load_study(name) for name in study_names()]
    for study in studies:
        if study.results.is_file():
            report(study, study.results, study.folder)
    INDEX.write_text(replaced(INDEX.read_text(), index(studies)))
    return INDEX
