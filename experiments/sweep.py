"""Every run of a study, one after the other; run it again to continue where it stopped.

    python -m experiments.sweep --study=ternary_penalty --small
    python -m experiments.sweep --study=ternary_penalty

The full setting appends to `studies/<study>/results.jsonl`; the small one (same study, 2-core minutes) to
`<workdir>/results.jsonl`. A run that fails or diverges is a row too and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bitnet_jax.config_file import load_config_file
from bitnet_jax.training.loop import fit
from bitnet_jax.training.metrics import read_metrics
from experiments.provenance import provenance
from experiments.study import Study, load_study, read_results


def run_one(study: Study, name: str, workdir: Path, small: bool) -> dict[str, Any]:
    """The row of one run; its failure is recorded in it, not raised."""
    arm, seed = study.runs()[name]
    overrides = {"seed": seed, **study.arms[arm]}
    row: dict[str, Any] = {"run": name, "arm": arm, "seed": seed, "overrides": overrides, **provenance()}
    start = time.monotonic()
    try:
        flags = [f"--config.{field}={value}" for field, value in overrides.items()]
        config = load_config_file(study.config + (":small" if small else ""), flags)
        result = fit(config, workdir / name)
        valid = [m for m in read_metrics(workdir / name / "metrics.jsonl") if m["kind"] == "valid"]
        row |= {name: result[name] for name in ("status", "step", "tokens", "parameters", "config_hash")}
        row |= {f"valid_{name}": value for name, value in result.get("valid", {}).items()}
        row["history"] = [{"step": m["step"], "valid_loss": m["loss"]} for m in valid]
    except Exception as error:  # the sweep goes on; the row says what happened
        traceback.print_exc()
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return row | {"wall_seconds": round(time.monotonic() - start, 1)}


def sweep(study: Study, workdir: Path, small: bool) -> Path:
    """Appends a row for every run that has none yet; returns the file of results."""
    results = workdir / "results.jsonl" if small else study.results
    results.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(results)
    # Rewriting drops a last line that a crash cut short, so that the next row starts on a line of its own.
    results.write_text("".join(json.dumps(row) + "\n" for row in done))
    for name in study.runs():
        if name in {row["run"] for row in done}:
            print(f"{study.name}: {name} is done", file=sys.stderr)
            continue
        row = run_one(study, name, workdir, small)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{study.name}: {name} {row['status']} {study.metric}={row.get(study.metric)}", file=sys.stderr)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", required=True, help="folder name below experiments/studies")
    parser.add_argument("--small", action="store_true", help="the same study, shrunk for two cores")
    parser.add_argument(
        "--workdir", type=Path, help="where runs are kept (default runs/studies/STUDY[-small])"
    )
    args = parser.parse_args(argv)
    study = load_study(args.study)
    workdir = args.workdir or Path("runs/studies") / (args.study + ("-small" if args.small else ""))
    print(sweep(study, workdir, args.small))


if __name__ == "__main__":
    main()
