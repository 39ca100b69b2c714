"""Do the C++ kernels of training leave the losses of the precision ladder as they were?

    python -m experiments.unchanged_loss --json experiments/studies/training_speed/unchanged_loss.json

Arms of the study precision_ladder are trained again, with every seed, and compared with the rows that the study
recorded on XLA's products and attention. A pair has the same seed, so the same initial weights and batches; other
rounding still makes them two samples of one training, as two seeds are.

Rule, written before the run: the loss is unchanged if for no arm the mean difference of its pairs is significant in a
two-sided t-test at 5 %, corrected for the number of arms (Bonferroni). What a mean difference would have been found
with a power of 80 % is reported beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from scipy import stats

from bitnet_experiments.intervals import detectable, interval
from bitnet_experiments.provenance import provenance
from bitnet_experiments.runs import train
from bitnet_experiments.study import load_study
from bitnet_jax.progress import progress_bar

ARMS = ("float32", "int8 channel", "ternary tensor", "ternary channel", "binary tensor")
LEVEL = 0.05 / len(ARMS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="file of the results; finished runs are kept in it"
    )
    target = parser.parse_args().json
    study = load_study("precision_ladder")
    recorded = {
        (row["arm"], row["seed"]): row for row in map(json.loads, study.results.read_text().splitlines())
    }
    pairs = [(arm, seed) for arm in ARMS for seed in study.seeds]
    results = json.loads(target.read_text()) if target.exists() else provenance() | {"losses": {}}
    with progress_bar(len(pairs), unit="run", description="precision ladder") as progress:
        for arm, seed in pairs:
            losses = results["losses"].setdefault(arm, {})
            if str(seed) not in losses:
                with tempfile.TemporaryDirectory() as folder:
                    row = train(study.settings(arm, seed, False), Path(folder) / "run")
                before = recorded[arm, seed]
                losses[str(seed)] = {"recorded": before["valid_loss"], "now": row["valid_loss"]}
                results["recorded_at"] = before["commit"]
                target.write_text(json.dumps(results, indent=1) + "\n")
            progress.update()
    print(markdown(results))


def compared(losses: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The paired differences of an arm: mean, p value, smallest mean that would have been found."""
    differences = [pair["now"] - pair["recorded"] for pair in losses.values()]
    recorded = [pair["recorded"] for pair in losses.values()]
    return {
        "interval": interval(differences),
        "deviation": statistics.stdev(recorded),
        "p": float(stats.ttest_1samp(differences, 0.0).pvalue),
        "detectable": detectable(interval(differences), level=LEVEL),
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of the README."""
    lines = [
        "| arm | recorded loss | now, minus recorded | deviation over seeds | p | detectable |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for arm, losses in results["losses"].items():
        found = compared(losses)
        mean = statistics.mean(pair["recorded"] for pair in losses.values())
        lines.append(
            f"| {arm} | {mean:.4f} | {found['interval'].mean:+.4f} ± {found['interval'].half:.4f} | "
            f"{found['deviation']:.4f} | {found['p']:.2f} | {found['detectable']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
