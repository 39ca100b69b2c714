"""Which rows of results belong to the study as it is now.

A row records the hash of the settings it was measured with (`Study.settings_hash`). It is

    done       the study has these settings now
    stale      the settings, or the tuned values, have changed, or the study has no such arm any more
    failed     the settings are those of now, and the run failed
    unhashed   recorded without a hash that can be compared: only the overrides, which are those of now, are known

Only stale rows are never used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitnet_experiments.study import Overrides, Row, Study
from bitnet_experiments.tuning import chosen

STANDINGS = ("done", "unhashed", "stale", "failed")


def standing(study: Study, row: Row, small: bool = False, more: Overrides | None = None) -> str:
    """One of STANDINGS.

    Args:
      more: overrides besides those of the arm: tuned values, and those of --set.
    """
    arm, seed = row["arm"], row["seed"]
    if arm not in study.arms:
        return "stale"
    now = study.settings_hashes(arm, seed, small, more)
    if "settings_hash" in row:
        found = "done" if row["settings_hash"] == next(iter(now), None) else "stale"
    elif row.get("config_hash") in now:
        found = "done"
    elif study.run is None and "config_hash" in row:
        found = "stale"
    else:  # the config_hash of a study's own `run` may be that of another model
        same = row.get("overrides") == plain(study.overrides(arm, seed, small, more))
        found = "unhashed" if same else "stale"
    return "failed" if found != "stale" and row["status"] == "failed" else found


def fresh_rows(study: Study, rows: Iterable[Row], tuning: Path | None = None) -> tuple[list[Row], list[Row]]:
    """The rows that the study's tables may use, and the stale ones.

    Args:
      tuning: the file of a study with TUNE; None: the one in its folder.
    """
    values = chosen(study, tuning) if study.tune else {}
    fresh: list[Row] = []
    stale: list[Row] = []
    for row in rows:
        tuned = values.get(row["arm"])
        known = not study.tune or tuned is not None
        use = known and standing(study, row, row.get("small", False), tuned) != "stale"
        (fresh if use else stale).append(row)
    return fresh, stale


def plain(value: Any) -> Any:
    """The value after a JSON round trip: tuples become lists."""
    return json.loads(json.dumps(value))
