"""Execute all runs of a study; a second start resumes where the first stopped.

STUDY is a name in experiments/studies, or a folder with study.py anywhere. The full setting adds rows to the study's
results.jsonl; --small (the same question on two cores in minutes) and --set to results.jsonl in their workdir, as
does a study outside of the repository with --workdir. With TUNE in study.py each arm's search runs first.

A run that fails or diverges is recorded as a row and does not stop the others, unless every arm fails alike. The next
start repeats runs whose settings have changed, and failed ones whose code has changed; with --retry-failed all failed
ones. Rows measured on another machine or by other code are not added to: see --again and --mix.

A study and its config are Python files that are executed: use only trusted ones.

example:
  bitnet-jax sweep ternary_penalty --small
  bitnet-jax sweep ternary_penalty --status
  bitnet-jax sweep ternary_penalty --jobs 2
  bitnet-jax sweep ternary_penalty --arms 'float*,ternary' --seeds 2
  bitnet-jax sweep ternary_penalty --set training.steps=2000
  bitnet-jax sweep ternary_penalty --index $SLURM_ARRAY_TASK_ID --of 16
  bitnet-jax sweep ternary_penalty --executor slurm --jobs 16 --cluster timeout_min=60
  bitnet-jax sweep /data/my_study --workdir /data/runs
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import write_json

EXECUTORS = ("process", "local", "slurm")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "study", metavar="STUDY", help="a name in experiments/studies, or a folder with study.py"
    )
    command.add_argument("--small", action="store_true", help="the same question, scaled down for two cores")
    command.add_argument(
        "--status", action="store_true", help="what is measured, stale and missing, per arm; runs nothing"
    )
    command.add_argument(
        "--arms", metavar="A,B", help="only these arms: names, or patterns such as 'ternary*'"
    )
    command.add_argument(
        "--seeds",
        metavar="N|A,B",
        help="the first N seeds of the study (more than it has: further ones), or these",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a setting of all runs, such as training.steps=200; the rows go to the workdir",
    )
    command.add_argument("--index", type=int, default=0, metavar="I", help="with --of: part I, from 0")
    command.add_argument(
        "--of", type=int, default=1, metavar="N", help="execute one of N equal parts, as a job array does"
    )
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel runs (default 1)")
    command.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="process",
        help="process: on this machine; slurm, local: through submitit (optional package submitit)",
    )
    command.add_argument(
        "--cluster",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of submitit's executor",
    )
    command.add_argument(
        "--retry-failed",
        action="store_true",
        help="also repeat failed runs whose settings and code are unchanged",
    )
    origin = command.add_mutually_exclusive_group()
    origin.add_argument(
        "--again", action="store_true", help="measure rows of another machine or other code again"
    )
    origin.add_argument(
        "--mix", action="store_true", help="add to rows of another machine or other code; new rows say so"
    )
    command.add_argument(
        "--workdir", type=Path, help="folder of the runs (default runs/studies/STUDY[-small][-set-...])"
    )


def run(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise ValueError(f"--jobs: got {args.jobs}, expected at least 1")
    from bitnet_experiments.plan import make_plan
    from bitnet_experiments.status import status
    from bitnet_experiments.study import load_study, read_results
    from bitnet_experiments.sweep import execute

    study, sets = load_study(args.study), dict(_assignment("--set", item) for item in args.set)
    elsewhere = args.workdir is not None and not study.committed
    plan = make_plan(
        study,
        args.workdir or study.workdir(args.small, sets),
        folder=args.workdir if elsewhere else None,
        small=args.small,
        arms=[name for name in (args.arms or "").split(",") if name],
        seeds=_seeds(args.seeds),
        sets=sets,
        part=(args.index, args.of),
        retry_failed=args.retry_failed,
        again=args.again,
        mix=args.mix,
    )
    if args.status:
        found = status(plan)
        write_json(args.json, found.figures())
        print(found.text())
        return 0
    cluster = dict(_assignment("--cluster", item) for item in args.cluster)
    results = execute(plan, args.jobs, args.executor, cluster)
    write_json(args.json, {"results": str(results), "rows": read_results(results)})
    print(results)
    return 0


def _assignment(option: str, text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is a Python literal, or else text."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise ValueError(f"{option}: got {text!r}, expected NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False, "null": None}.get(value, value)


def _seeds(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"--seeds: got {text!r}, expected a number such as 5, or seeds such as 0,1,2")
    return numbers if "," in text else numbers[0]
