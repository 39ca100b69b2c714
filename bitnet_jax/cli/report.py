"""Rebuild the verdict, tables, figures and HTML page of a study from its results.

Verdict and tables are written between the marker comments of the study's README; figures, verdict.json and report.html
(the README as one self-contained page) next to it. --all does this for every study with results, and rewrites the
table of all studies in experiments/README.md. --check writes nothing: it exits with 1 if anything committed differs
from what the rows give, or if rows are stale, of several machines or of uncommitted code.

example:
  bitnet-jax report ternary_penalty
  bitnet-jax report ternary_penalty --workdir runs/studies/ternary_penalty-small   # of a small sweep
  bitnet-jax report --all --check
  bitnet-jax report --compare scaling precision_ladder   # verdicts, and the arms that both have
"""

from __future__ import annotations

import argparse
import sys
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
        "--check", action="store_true", help="compare what is committed with the rows; write nothing"
    )
    command.add_argument(
        "--compare", nargs=2, metavar="STUDY", help="print two studies side by side; write nothing"
    )
    command.add_argument(
        "--workdir", type=Path, help="report the small sweep in this folder, into this folder"
    )


def run(args: argparse.Namespace) -> int:
    if (args.study is not None) + args.all + (args.compare is not None) != 1:
        raise ValueError("expected exactly one of STUDY, --all and --compare; give one")
    if args.check and (args.workdir or args.compare):
        raise ValueError("got --check with --workdir or --compare; --check compares committed reports")
    from bitnet_experiments.report import report, report_all
    from bitnet_experiments.study import load_study, study_names

    if args.compare:
        from bitnet_experiments.compare import compare

        print(compare(*map(load_study, args.compare)))
        return 0
    if args.check:
        return _check(study_names() if args.all else [args.study], index=args.all)
    if args.all:
        print(report_all())
        return 0
    study = load_study(args.study)
    folder = args.workdir or study.folder
    text = report(study, folder / "results.jsonl", folder)
    write_json(args.json, {"study": study.name, "folder": str(folder), "markdown": text})
    print(text)
    return 0


def _check(names: list[str], index: bool) -> int:
    """Prints the first difference of every study to stderr, and notes on rows to measure again."""
    from bitnet_experiments.report import check, check_index
    from bitnet_experiments.study import load_study

    differing = 0
    for name in names:
        differences, notes = check(load_study(name))
        for note in notes:
            print(f"note: {note}")
        if differences:
            differing += 1
            print(f"error: {differences[0]}; run: bitnet-jax report {name}", file=sys.stderr)
    of_index = check_index() if index else []
    for difference in of_index:
        print(f"error: {difference}; run: bitnet-jax report --all", file=sys.stderr)
    print(f"{len(names) - differing} of {len(names)} studies agree with their rows")
    return 1 if differing or of_index else 0
