"""Tables and figures of a study, rebuilt from its results alone.

    python -m experiments.report --study=ternary_penalty

Writes `curves.png` and the table between the two marker comments of the study's README.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window; before pyplot is imported
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from experiments.study import Study, load_study, read_results

BEGIN, END = "<!-- table: written by experiments.report -->", "<!-- end of table -->"


def mean_interval(values: list[float]) -> str:
    """`mean ± half width` of the 95 % Student-t interval over seeds."""
    if len(values) < 2:
        return f"{np.mean(values):.4f} (one seed)"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{np.mean(values):.4f} ± {half:.4f}"


def table(study: Study, rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per arm, and its difference to the baseline paired by seed."""
    by_arm = {arm: {r["seed"]: r for r in rows if r["arm"] == arm} for arm in study.arms}
    lines = [
        f"| arm | seeds | {study.metric} | difference to {study.baseline} (paired) | parameters | seconds per run |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for arm, runs in by_arm.items():
        good = {seed: row[study.metric] for seed, row in runs.items() if row["status"] == "finished"}
        if not good:
            lines.append(
                f"| {arm} | 0 | {', '.join(r['status'] for r in runs.values()) or 'not run'} | | | |"
            )
            continue
        base = {s: r[study.metric] for s, r in by_arm[study.baseline].items() if r["status"] == "finished"}
        paired = [good[seed] - base[seed] for seed in good if seed in base]
        difference = "" if arm == study.baseline or not paired else mean_interval(paired)
        first = next(iter(runs.values()))
        seconds = np.mean([row["wall_seconds"] for row in runs.values()])
        lines.append(
            f"| {arm} | {len(good)} | {mean_interval(list(good.values()))} | {difference} "
            f"| {first['parameters']:,} | {seconds:.0f} |"
        )
    first, commits = rows[0], ", ".join(sorted({row["commit"] for row in rows}))
    lines += [
        "",
        f"Mean ± 95 % Student-t interval over seeds. Commits {commits}; {first['hardware']}, "
        f"jax {first['jax']}. Command: `python -m experiments.sweep --study={study.name}`.",
    ]
    return "\n".join(lines)


def curves(study: Study, rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over steps: the mean over seeds as a line, the spread as a band."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm in study.arms:
        histories = [r["history"] for r in rows if r["arm"] == arm and r["status"] == "finished"]
        if not histories:
            continue
        steps = [point["step"] for point in histories[0]]
        losses = np.array([[point["valid_loss"] for point in history] for history in histories])
        (line,) = axes.plot(steps, losses.mean(0), label=arm)
        axes.fill_between(steps, losses.min(0), losses.max(0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="step", ylabel="held-out loss (nats)", title=f"{study.name}: mean and range over seeds")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(study: Study, results: Path, folder: Path) -> str:
    rows = read_results(results)
    if not rows:
        raise ValueError(f"{results} has no results; run: python -m experiments.sweep --study={study.name}")
    text = table(study, rows)
    curves(study, rows, folder / "curves.png")
    readme = folder / "README.md"
    old = readme.read_text() if readme.is_file() else f"# {study.name}\n\n{BEGIN}\n{END}\n"
    head, _, rest = old.partition(BEGIN)
    tail = rest.partition(END)[2]
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", required=True, help="folder name below experiments/studies")
    parser.add_argument("--workdir", type=Path, help="report a small sweep kept there, into that folder")
    args = parser.parse_args(argv)
    study = load_study(args.study)
    folder = args.workdir or study.folder
    print(report(study, folder / "results.jsonl", folder))


if __name__ == "__main__":
    main()
