"""Rebuild the tables, figures and HTML page of a study from its results.

Tables are written between the marker comments of the study's README; figures and report.html (the README as one
self-contained page) next to it. --all does this for every study with results, and rewrites the table of all studies
in experiments/README.md.

example:
  bitnet-jax report ternary_penalty
  bitnet-jax report ternary_penalty --workdir runs/studies/ternary_penalty-small   # of a small sweep
  bitnet-jax report --all
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bitnet_jax.cli.shared import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "study", nargs="?", metavar="STUDY", help="a name in experiments/studies, or a folder with study.py"
    )
    command.add_argument(
        "--all", action="store_true", help="report every study, and the table of all studies"
    )
    command.add_argument(
        "--workdir", type=Path, help="report the small sweep in this folder, into this folder"
    )


def run(args: argparse.Namespace) -> int:
    if args.all == (args.study is not None):
        raise ValueError(f"got {'STUDY with --all' if args.all else 'no STUDY'}, expected STUDY or --all")
    from bitnet_experiments.report import report, report_all
    from bitnet_experiments.study import load_study

    if args.all:
        print(report_all())
        return 0
    study = load_study(args.study)
    folder = args.workdir or study.folder
    text = report(study, folder / "results.jsonl", folder)
    write_json(args.json, {"study": study.name, "folder": str(folder), "markdown": text})
    print(text)
    return 0
