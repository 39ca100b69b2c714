"""List the runs below a folder with their results and speed, or compare some of them.

Finished, running and damaged runs are listed alike; nothing is changed. The loss is the newest one on held-out data.
Tokens per second and MFU (share of the peak of the devices) are those of productive time, goodput is its share of the
wall time over all processes of a run.

example:
  bitnet-jax runs runs --sort loss
  bitnet-jax runs runs --compare first binary     # settings that differ, and results
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folder", metavar="FOLDER", type=Path, help="folder that contains runs, at any depth"
    )
    command.add_argument("--sort", metavar="COLUMN", help="a column of the table (default: run)")
    command.add_argument(
        "--compare", nargs="+", metavar="RUN", help="at least two runs, named as in the table of FOLDER"
    )


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.names import check_name
    from bitnet_jax.training.runs import COLUMNS, differing_settings, list_runs

    columns = {SHORT.get(name, name): name for name in COLUMNS}
    if args.sort is not None:
        check_name("--sort", args.sort, columns)
    rows = list_runs(args.folder, columns.get(args.sort))
    if args.compare is None:
        write_json(args.json, {"runs": rows})
        print(_table(rows) if rows else f"{args.folder}: no runs")
        return 0
    by_name = {row["run"]: row for row in rows}
    names = list(dict.fromkeys(args.compare))
    for name in names:
        check_name("--compare", name, by_name)
    if len(names) < 2:
        raise ValueError(f"--compare: got {', '.join(names)}, expected at least two runs")
    settings = differing_settings({name: args.folder / name for name in names})
    results = {
        column: {name: by_name[name][column] for name in names} for column in COLUMNS if column != "run"
    }
    write_json(args.json, {"settings": settings, "results": results})
    print(_comparison(names, settings, results))
    return 0


SHORT = {"bits_per_byte": "bits/byte", "tokens_per_second": "tokens/s"}
SHARES, COUNTS = ("mfu", "goodput"), ("step", "steps", "parameters")


def _shown(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column in SHARES:
        return f"{100 * value:.1f} %"
    if column in COUNTS or column == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "problem"]
    cells = [[SHORT.get(name, name) for name in names]]
    cells += [[_shown(name, row[name]) for name in names] for row in rows]
    left = [isinstance(next((row[name] for row in rows if row[name] is not None), ""), str) for name in names]
    lines = _aligned(cells, left)
    problems = [f"{row['run']}: {row['problem']}" for row in rows if row["problem"]]
    return "\n".join([*lines, *([""] if problems else []), *problems])


def _comparison(
    names: Sequence[str], settings: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> str:
    lines = [["setting", *names]]
    lines += [[field, *(str(values[name]) for name in names)] for field, values in settings.items()]
    if not settings:
        lines.append(["(no setting differs)", *("" for _ in names)])
    lines += [[""] * len(lines[0]), ["result", *names]]
    for column, values in results.items():
        if any(value is not None for value in values.values()):
            lines.append([SHORT.get(column, column), *(_shown(column, values[name]) for name in names)])
    return "\n".join(_aligned(lines, [True] + [False] * len(names)))


def _aligned(cells: Sequence[Sequence[str]], left: Sequence[bool]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if start else cell.rjust(width)
            for cell, width, start in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in cells
    ]
