"""Execute all runs of a study; a second start resumes where the first stopped.

STUDY is a name in experiments/studies, or a folder with study.py. The full setting adds rows to the study's
results.jsonl; --small (the same question on two cores in minutes) to results.jsonl in its workdir. A run that fails
or diverges is recorded as a row and does not stop the others. The next start repeats failed runs whose settings have
changed, and with --retry-failed the others too.

A study and its config are Python files that are executed: use only trusted ones.

example:
  bitnet-jax sweep ternary_penalty --small
  bitnet-jax sweep ternary_penalty --jobs 2
  bitnet-jax sweep ternary_penalty --executor slurm --jobs 16 --cluster timeout_min=60
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bitnet_jax.cli.shared import write_json

EXECUTORS = ("process", "local", "slurm")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "study", metavar="STUDY", help="a name in experiments/studies, or a folder with study.py"
    )
    command.add_argument("--small", action="store_true", help="the same question, scaled down for two cores")
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
        "--retry-failed", action="store_true", help="also repeat failed runs whose settings are unchanged"
    )
    command.add_argument(
        "--workdir", type=Path, help="folder of the runs (default runs/studies/STUDY[-small])"
    )


def run(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise ValueError(f"--jobs: got {args.jobs}, expected at least 1")
    from bitnet_experiments.study import load_study, read_results
    from bitnet_experiments.sweep import sweep

    cluster = {
        name: int(value) if value.isdigit() else value
        for name, _, value in (item.partition("=") for item in args.cluster)
    }
    study = load_study(args.study)
    results = sweep(
        study,
        args.workdir or study.workdir(args.small),
        args.small,
        jobs=args.jobs,
        executor=args.executor,
        retry_failed=args.retry_failed,
        cluster=cluster,
    )
    write_json(args.json, {"results": str(results), "rows": read_results(results)})
    print(results)
    return 0
