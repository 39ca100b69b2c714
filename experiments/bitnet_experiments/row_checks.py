"""Whether rows that are compared may be: made with the present settings, on one machine, from committed code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitnet_experiments.freshness import fresh_rows
from bitnet_experiments.origin import DIRTY
from bitnet_experiments.study import Row, Study, read_results


def comparable_rows(study: Study, results: Path | None = None) -> list[Row]:
    """The rows that tables and figures use: without stale ones, unless the study says that it has to be redone.

    Args:
      results: the file of the rows, which has the tuned values beside it; None: the one in the study's folder.
    """
    results = results or study.results
    rows = read_results(results)
    return list(rows) if study.redo else fresh_rows(study, rows, results.with_name("tuning.jsonl"))[0]


def problems(study: Study, rows: Sequence[Row]) -> list[str]:
    """What is wrong with the rows, each in one line."""
    found = []
    _, stale = fresh_rows(study, rows)
    if stale:
        found.append(
            f"{len(stale)} of {len(rows)} rows were made with other settings than the study has now, such as "
            f"{stale[0]['run']}"
        )
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(study.block_of(row["arm"]), []).append(row)
    for block, members in blocks.items():
        for what, field in (("machines", "hardware"), ("states of the code", "code")):
            values = sorted({row[field] for row in members if field in row})
            if len(values) > 1:
                found.append(f"{block and f'{block}: '}rows of {len(values)} {what}: {', '.join(values)}")
    dirty = [row for row in rows if row["commit"].endswith(DIRTY) or row.get("code", "").endswith(DIRTY)]
    if dirty:
        found.append(
            f"{len(dirty)} of {len(rows)} rows are of uncommitted code, such as {dirty[0]['run']}: {dirty[0]['commit']}"
        )
    return found
