"""How close inference comes to what this machine can do: every figure of the study cpu_limits, and its tables.

    python -m experiments.cpu_limits                   measure what is missing, then write the tables (15 minutes)
    python -m experiments.cpu_limits --only 2b_ternary measure this again
    python -m experiments.cpu_limits --report          the tables alone, from the results that are there

Each measurement is a command of its own, run alone, whose figures go to results/<name>.json of the study; the tables
in report.md are made of these files. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.doctor import available_instruction_sets

STUDY = Path(__file__).parent / "studies" / "cpu_limits"
RESULTS = STUDY / "results"
MODEL = ("-m", "bitnet_jax.cli", "bench")
KERNELS = ("-m", "bitnet_kernels.bench", "--seconds", "0.3", "--working-set", "512")
TWO_B = ("--preset", "2b4t", "--prompt", "512", "--generate", "64", "--repeats", "3")
SHORT = (
    "--preset",
    "2b4t",
    "--prompt",
    "16",
    "--generate",
    "64",
    "--repeats",
    "3",
)  # as engines time decoding
LARGE = ("--prompt", "16", "--generate", "9", "--repeats", "3", "--head", "int4")
VNNI = "without amx"  # the fastest instruction set but AMX: what most processors of today have at best

# name -> (words behind python, instruction set or None for the fastest)
COMMANDS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "kernels": ((*KERNELS, "--suite", "all"), None),
    "kernels_vnni": ((*KERNELS, "--suite", "prefill"), VNNI),
    "2b_ternary": ((*MODEL, *TWO_B, "--recipe", "bitnet_b158", "--head", "int4"), None),
    "2b_ternary_vnni": ((*MODEL, *TWO_B, "--recipe", "bitnet_b158", "--head", "int4"), VNNI),
    "2b_ternary5": (
        (*MODEL, *TWO_B, "--recipe", "bitnet_b158", "--ternary-format", "ternary5", "--head", "int4"), None,
    ),
    "2b_ternary_head_bfloat16": ((*MODEL, *TWO_B, "--recipe", "bitnet_b158", "--head", "float"), None),
    "2b_ternary_short": ((*MODEL, *SHORT, "--recipe", "bitnet_b158", "--head", "int4"), None),
    "2b_binary_short": ((*MODEL, *SHORT, "--recipe", "bitnet", "--head", "int4"), None),
    "2b_binary": ((*MODEL, *TWO_B, "--recipe", "bitnet", "--head", "int4"), None),
    "2b_binary_vnni": ((*MODEL, *TWO_B, "--recipe", "bitnet", "--head", "int4"), VNNI),
    "100b_binary": ((*MODEL, *LARGE, "--preset", "100b", "--recipe", "bitnet"), None),
    "70b_ternary5": (
        (*MODEL, *LARGE, "--preset", "70b", "--recipe", "bitnet_b158", "--ternary-format", "ternary5"), None,
    ),
    "training_cost": (("-m", "experiments.training_cost"), None),
}  # fmt: skip


def measure(name: str) -> None:
    """Runs one command; its figures appear whole or not at all."""
    words, isa = COMMANDS[name]
    target, temporary = RESULTS / f"{name}.json", RESULTS / f".{name}.json"
    environment = dict(os.environ)
    if isa == VNNI:
        available = [isa for isa in available_instruction_sets() if isa != "amx"]
        environment["BITNET_KERNELS_ISA"] = available[-1]
    print(f"{name}: python {' '.join(words)}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, *words, "--json", str(temporary)], check=True, env=environment)
    temporary.rename(target)


def report(results: dict[str, dict[str, Any]]) -> str:
    """The tables in Markdown, of what was measured."""
    models = {name: figures for name, figures in results.items() if "decode_tokens_per_second" in figures}
    lines = [
        "# What was measured",
        "",
        "Made by `python -m experiments.cpu_limits --report` from results/.",
        "",
    ]
    lines += _model_table(models)
    if "kernels" in results:
        lines += _kernel_table("Products, the fastest instruction set", results["kernels"])
    if "kernels_vnni" in results:
        lines += _kernel_table("Products of many rows without AMX", results["kernels_vnni"])
    if "training_cost" in results:
        lines += _cost_table(results["training_cost"])
    lines += _provenance_table(results)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = ["---"] + ["--:"] * (len(head) - 1)
    return [*(f"| {' | '.join(cells)} |" for cells in (head, align, *rows)), ""]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _model_table(models: dict[str, dict[str, Any]]) -> list[str]:
    head = ("model", "ran on", "prompt", "prefill tokens/s", "of dot peak", "decode tokens/s", "bytes a token",
            "of read ceiling", "kernels / step", "head", "memory")  # fmt: skip
    rows = [
        (
            name,
            f["isa"],
            str(f["prompt"]),
            f"{f['prefill_tokens_per_second']:.0f}",
            f"{_percent(f['prefill_peak_fraction'])} of {f['dot_peak_gmacs_per_second']:.0f} GMAC/s",
            f"{f['decode_tokens_per_second']:.2f}",
            f"{f['bytes_per_token'] / 1e6:,.0f} MB",
            f"{_percent(f['ceiling_fraction'])} of {f['read_ceiling_gbytes_per_second']:.1f} GB/s",
            _percent(f["kernel_fraction"]),
            f["head_format"],
            f"{f['peak_rss_bytes'] / 1e9:.1f} GB, {f['rss_anon_bytes'] / 1e9:.2f} not of the file",
        )
        for name, f in models.items()
    ]
    return ["## Whole models, random weights of the real shape", "", *_table(head, rows)]


def _kernel_table(title: str, figures: dict[str, Any]) -> list[str]:
    head = ("op", "format", "m", "n x k", "microseconds [p10, p90]", "GB/s", "of read ceiling", "GMAC/s",
            "of dot peak", "times XLA float32, bfloat16, int8")  # fmt: skip
    rows = []
    for row in figures["rows"]:
        times = [row.get(f"speedup_vs_xla_{name}") for name in ("float32", "bfloat16", "int8")]
        gbytes, gmacs = row.get("gbytes_per_second"), row.get("gmacs_per_second")
        rows.append(
            (
                row["op"],
                str(row.get("format") or "-"),
                str(row.get("m") or "-"),
                f"{row['n']} x {row['k']}" if row.get("n") else "-",
                f"{row['microseconds']:.1f} [{row['microseconds_p10']:.1f}, {row['microseconds_p90']:.1f}]",
                f"{gbytes:.1f}" if gbytes else "-",
                _percent(row.get("ceiling_fraction")),
                f"{gmacs:.0f}" if gmacs else "-",
                _percent(row.get("peak_fraction")),
                ", ".join(f"{value:.1f}" if value else "-" for value in times),
            )
        )
    return [f"## {title}", "", *_table(head, rows)]


def _cost_table(figures: dict[str, Any]) -> list[str]:
    rows = [
        (recipe, f"{figures['milliseconds'][recipe]['median']:.1f}", f"{100 * cost['median']:+.1f} % "
         f"[{100 * cost['p10']:+.1f}, {100 * cost['p90']:+.1f}]")
        for recipe, cost in figures["cost_against_float32"].items()
    ]  # fmt: skip
    return ["## Fake quantization in training", "", *_table(("recipe", "ms a step", "against float32"), rows)]


def _provenance_table(results: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, figures in results.items():
        by = figures["provenance"]
        hardware = by.get("hardware") or f"{by['threads']} threads of {by['processor']}"
        rows.append(
            (name, by["commit"], by.get("date", "-"), hardware, f"jax {by['jax']}, Python {by['python']}")
        )
    return ["## Measured with", "", *_table(("result", "commit", "date", "hardware", "versions"), rows)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=sorted(COMMANDS), help="measure these, also again")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        missing = [name for name in COMMANDS if not (RESULTS / f"{name}.json").exists()]
        for name in options.only if options.only is not None else missing:
            measure(name)
    files = {name: RESULTS / f"{name}.json" for name in COMMANDS}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    (STUDY / "report.md").write_text(report(results))
    print(f"{STUDY / 'report.md'}: {len(results)} of {len(COMMANDS)} results")


if __name__ == "__main__":
    main()
