"""Decoding while other processes keep processors busy, with llama.cpp in turn where llama-cpp-python is installed.

    python -m experiments.neighbour --json neighbour.json             five minutes

With T threads on T processors and H busy processes the system's scheduler gives a decoding process `T / (T + H)` of the
time it has alone, its fair share. Threads that wait for one another by spinning can get less: one that has lost its
processor keeps all others waiting. Loads take turns; each has its own busy processes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitnet_experiments.provenance import provenance
from bitnet_jax.progress import progress_bar
from bitnet_jax.tools.model_bench import bench_model, model_folder, preset_config
from bitnet_jax.tools.peer_bench import PYTHON, compare

PROMPT, NEW, ROUNDS, VISITS = 64, 64, 2, 3
BUSY = (0, 1, 2)  # processes


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """That many processes that never wait."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(preset: str, recipe: str) -> dict[str, Any]:
    sides = ("ours", "peer") if importlib.util.find_spec("llama_cpp") else ("ours",)
    speeds: dict[str, dict[int, list[float]]] = {side: {count: [] for count in BUSY} for side in sides}
    config = preset_config(preset, recipe, "int4")
    options: dict[str, Any] = {"prompt": PROMPT, "new_tokens": NEW}
    with (
        model_folder(config, None) as folder,
        progress_bar(VISITS * len(BUSY), unit="load", description="decoding beside busy processes") as bar,
    ):
        for _ in range(VISITS):
            for count in BUSY:
                with busy(count):
                    if "peer" in sides:
                        figures = compare(folder, PYTHON, rounds=ROUNDS, **options)
                        for side, of_side in speeds.items():
                            of_side[count].append(figures[f"{side}_decode_tokens_per_second"]["median"])
                    else:
                        figures = bench_model(folder, repeats=ROUNDS, quick=True, **options)
                        speeds["ours"][count].append(figures["decode_tokens_per_second"])
                bar.update()
    medians = {
        side: {count: statistics.median(values) for count, values in of_side.items()}
        for side, of_side in speeds.items()
    }
    return {
        "preset": preset,
        "recipe": recipe,
        "peer": figures.get("peer"),
        "rows": [
            {
                "busy_processes": count,
                "fair_share": figures["threads"] / (figures["threads"] + count),
                **{
                    name: value
                    for side, of_side in medians.items()
                    for name, value in {
                        f"{side}_tokens_per_second": of_side[count],
                        f"{side}_share": of_side[count] / of_side[0],
                    }.items()
                },
            }
            for count in BUSY
        ],
        "provenance": provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="125m")
    parser.add_argument("--recipe", default="bitnet_b158")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    args = parser.parse_args()
    figures = measure(args.preset, args.recipe)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    for row in figures["rows"]:
        speeds = ", ".join(
            f"{side} {row[f'{side}_tokens_per_second']:.1f} tokens/s ({row[f'{side}_share']:.2f})"
            for side in ("ours", "peer")
            if f"{side}_share" in row
        )
        print(f"{row['busy_processes']} busy: {speeds}; fair share {row['fair_share']:.2f}")


if __name__ == "__main__":
    main()
