"""What a study is: a folder with arms, seeds, one base config, and a file of results, one line per run."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STUDIES = Path(__file__).parent / "studies"


@dataclasses.dataclass(frozen=True)
class Study:
    """The names defined in `studies/<name>/study.py`, and where its results lie.

    Attributes:
      config: Python file with `get_config(variant)`.
      metric: the figure of `result.json` that the study is about; smaller is better.
      baseline: the arm that the others are compared with, seed by seed.
      arms: name of the arm -> overrides of config fields, dotted.
    """

    name: str
    config: str
    metric: str
    baseline: str
    arms: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]

    @property
    def folder(self) -> Path:
        return STUDIES / self.name

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    def runs(self) -> dict[str, tuple[str, int]]:
        """Name of the run -> (arm, seed)."""
        return {f"{arm}-seed{seed}": (arm, seed) for seed in self.seeds for arm in self.arms}


def load_study(name: str) -> Study:
    """Raises ValueError, naming the studies there are, when there is none of this name."""
    names = sorted(p.parent.name for p in STUDIES.glob("*/study.py"))
    if name not in names:
        raise ValueError(f"got study {name!r}, expected one of {', '.join(names)}")
    module = importlib.import_module(f"experiments.studies.{name}.study")
    return Study(name, module.CONFIG, module.METRIC, module.BASELINE, module.ARMS, module.SEEDS)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows written so far; a last line cut short by a crash is ignored (its run is simply repeated)."""
    rows = []
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON ({error}); remove the line") from error
    return rows
