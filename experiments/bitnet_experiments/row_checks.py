"""Whether the rows of a study can be compared: made with its present settings, on one machine, from committed code."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bitnet_experiments.study import Row, Study


def fresh_rows(study: Study, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows made with the overrides that the study has now, and the others."""
    fresh: list[Row] = []
    stale: list[Row] = []
    for row in rows:
        same = row["arm"] in study.arms and row.get("overrides") == json.loads(
            json.dumps(study.overrides(row["arm"], row["seed"]))
        )
        (fresh if same else stale).append(row)
    return fresh, stale


def problems(study: Study, rows: Sequence[Row]) -> list[str]:
    """What is wrong with the rows, each in one line."""
    found = []
    _, stale = fresh_rows(study, rows)
    if stale:
        found.append(
            f"{len(stale)} of {len(rows)} rows were made with other settings than the study has now, such as "
            f"{stale[0]['run']}"
        )
    machines = sorted({row["hardware"] for row in rows})
    if len(machines) > 1:
        found.append(f"rows of {len(machines)} machines: {', '.join(machines)}")
    dirty = [row for row in rows if row["commit"].endswith("-dirty")]
    if dirty:
        found.append(
            f"{len(dirty)} of {len(rows)} rows are of uncommitted code, such as {dirty[0]['run']}: {dirty[0]['commit']}"
        )
    return found
