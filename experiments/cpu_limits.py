"""Inference speed relative to the limits of this machine: all figures and tables of the study cpu_limits.

    python -m experiments.cpu_limits                   measure what is missing here, write the tables (half an hour)
    python -m experiments.cpu_limits --only 2b_ternary repeat this measurement
    python -m experiments.cpu_limits --report          only the tables, from existing results

Each measurement is a separate command, run alone, whose figures are written to results/<machine>/<name>.json of the
study; a machine is named after its fastest instruction set. The tables in report.md are made from these files. Run it
on an otherwise idle machine.
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

from bitnet_jax.tools.machine import available_instruction_sets

STUDY = Path(__file__).parent / "studies" / "cpu_limits"
RESULTS = STUDY / "results"
MODEL = ("-m", "bitnet_jax.cli", "bench")
KERNELS = ("-m", "bitnet_kernels.bench", "--working-set", "512", "--seconds")
TWO_B = ("--preset", "2b4t", "--generate", "64", "--repeats", "7", "--prompt", "512")
SHORT = (*TWO_B[:-1], "16")  # as engines time decoding
LARGE = ("--prompt", "16", "--generate", "9", "--repeats", "3", "--head", "int4")
VNNI = (
    "avx512vbmi"  # products by dot-product instructions only; if absent, the fastest instruction set is used
)

# Minimum weights of a product compared with the read ceiling: with fewer, call overhead exceeds reading.
SMALLEST = 2560 * 2560

# The fastest engines in third-party measurements on 2 threads of a Zen 4: tokens/s, read ceiling in GB/s, fraction of
# the VNNI dot peak in prefill of 512 tokens. ik_llama.cpp, IQ2_BN repacked (6-bit head) and Q1_0_G128.
TERNARY_PEER, BINARY_PEER = (34.0, 32.0, 0.53), (24.3, 32.0, 0.19)

# name -> (arguments of python, instruction set or None for the fastest)
COMMANDS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "kernels": ((*KERNELS, "0.6", "--suite", "all"), None),
    "kernels_vnni": ((*KERNELS, "2", "--suite", "prefill"), VNNI),
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


def machine() -> str:
    return available_instruction_sets()[-1]


def load() -> dict[str, dict[str, Any]]:
    """machine -> name -> figures."""
    return {
        folder.name: {
            name: json.loads(file.read_text())
            for name in COMMANDS
            if (file := folder / f"{name}.json").exists()
        }
        for folder in sorted(RESULTS.iterdir())
        if folder.is_dir()
    }


def measure(name: str) -> None:
    """Runs one command; its figures are written atomically."""
    words, isa = COMMANDS[name]
    folder = RESULTS / machine()
    target, temporary = folder / f"{name}.json", folder / f".{name}.json"
    environment = dict(os.environ)
    if isa in available_instruction_sets():
        environment["BITNET_KERNELS_ISA"] = isa
    print(f"{name}: python {' '.join(words)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, *words, "--json", str(temporary)], check=True, env=environment)
    temporary.rename(target)


def report(machines: dict[str, dict[str, Any]]) -> str:
    """The tables in Markdown, from machine -> name -> figures."""
    lines = [
        "# Measurements",
        "",
        "Generated from results/ by `python -m experiments.cpu_limits --report`.",
        "",
    ]
    for name, results in machines.items():
        provenance = results["kernels"]["provenance"]
        lines += [f"# {name}: {provenance['threads']} threads of {provenance['processor']}", ""]
        lines += _bar_table(results)
        lines += _model_table({n: f for n, f in results.items() if "decode_tokens_per_second" in f})
        lines += _kernel_table("Products on the fastest instruction set", results["kernels"])
        lines += _kernel_table(f"Products of many rows on {VNNI}", results["kernels_vnni"])
        lines += _cost_table(results["training_cost"])
        lines += _provenance_table(results)
    return "\n".join(lines)


def bars(results: dict[str, Any]) -> list[tuple[str, str, str, list[float]]]:
    """Rows (quantity, required minimum, target, measured figures) for one machine."""
    rows, summary = results["kernels"]["rows"], results["kernels"]["summary"]

    def products(name: str, rows: Sequence[dict[str, Any]], format: str, m: int) -> list[float]:
        return [
            row[name]
            for row in rows
            if (row["op"], row["format"], row["m"]) == ("packed_matmul", format, m)
            and row["n"] * row["k"] >= SMALLEST
        ]

    def against(peer: tuple[float, float, float], name: str) -> list[float]:
        tokens, ceiling, _ = peer
        short = results[f"{name}_short"]
        mine = short["decode_tokens_per_second"] / short["read_ceiling_gbytes_per_second"]
        return [mine / (tokens / ceiling)]

    def prefill(peer: tuple[float, float, float], name: str) -> list[float]:
        mine, peak = results[name], results[f"{name}_vnni"]["dot_peak_gmacs_per_second"]
        macs = mine["prefill_peak_fraction"] * mine["dot_peak_gmacs_per_second"]
        return [macs / peak / peer[2]]

    models = [figures for figures in results.values() if "kernel_fraction" in figures]
    fork_join = [row["microseconds"] for row in rows if row["op"] == "fork_join"]
    vnni = results["kernels_vnni"]["rows"]
    cost = results["training_cost"]["cost_against_float32"]
    decode = products("ceiling_fraction", rows, "ternary2", 1)
    ternary = products("peak_fraction", vnni, "ternary2", 128)
    binary = products("peak_fraction", rows, "binary", 128)
    quantizing = [cost[name]["median"] for name in ("bitnet_b158", "bitnet")]
    return [
        ("ternary2, one row of x: fraction of the read ceiling", "0.90", "0.97", decode),
        ("binary / ternary2, weights per second", "1.5", "2.0", [summary["binary_over_ternary2_m1"]]),
        ("ternary2, 128 rows of x: fraction of the VNNI dot peak", "0.75", "0.95", ternary),
        ("binary, 128 rows of x: fraction of the dot peak of the instruction set", "0.75", "1.2", binary),
        (
            "kernels alone: fraction of a decode step",
            "0.85",
            "0.95",
            [f["kernel_fraction"] for f in models],
        ),
        ("fork and join, microseconds", "1", "0.3", fork_join),
        (
            "2B-4T ternary, decode, relative to the best engine",
            "1.0",
            "1.3",
            against(TERNARY_PEER, "2b_ternary"),
        ),
        (
            "2B-4T ternary, prefill, relative to the best engine",
            "1.0",
            "1.7",
            prefill(TERNARY_PEER, "2b_ternary"),
        ),
        ("2B-4T binary, decode, relative to the best engine", "2.0", "3", against(BINARY_PEER, "2b_binary")),
        ("2B-4T binary, prefill, relative to the best engine", "3", "5", prefill(BINARY_PEER, "2b_binary")),
        (
            "100B binary: fraction of the read ceiling",
            "runs",
            "0.8",
            [results["100b_binary"]["ceiling_fraction"]],
        ),
        ("fake quantization: overhead of a training step", "0.15", "0.05", quantizing),
    ]


def _bar_table(results: dict[str, Any]) -> list[str]:
    rows = [
        (part, must, aim, " to ".join(f"{end(figures):.2f}" for end in ((min, max) if len(figures) > 1 else (min,))))
        for part, must, aim, figures in bars(results)
    ]  # fmt: skip
    return ["## Requirements", "", *_table(("quantity", "required", "target", "measured"), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = ["---"] + ["--:"] * (len(head) - 1)
    return [*(f"| {' | '.join(cells)} |" for cells in (head, align, *rows)), ""]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _model_table(models: dict[str, dict[str, Any]]) -> list[str]:
    head = ("model", "ran on", "prompt", "prefill tokens/s", "of dot peak", "decode tokens/s", "bytes per token",
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
            f"{f['peak_rss_bytes'] / 1e9:.1f} GB, {f['rss_anon_bytes'] / 1e9:.2f} outside the file",
        )
        for name, f in models.items()
    ]
    return ["## Whole models, random weights of the real shape", "", *_table(head, rows)]


def _kernel_table(title: str, figures: dict[str, Any]) -> list[str]:
    head = ("op", "format", "m", "n x k", "microseconds [p10, p90]", "GB/s", "of read ceiling", "GMAC/s",
            "of dot peak", "speedup over XLA float32, bfloat16, int8")  # fmt: skip
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
    return [
        "## Fake quantization in training",
        "",
        *_table(("recipe", "ms per step", "overhead over float32"), rows),
    ]


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
    parser.add_argument(
        "--only", nargs="*", choices=sorted(COMMANDS), help="measure these, again if necessary"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        missing = [name for name in COMMANDS if not (RESULTS / machine() / f"{name}.json").exists()]
        for name in options.only if options.only is not None else missing:
            measure(name)
    machines = load()
    (STUDY / "report.md").write_text(report(machines))
    print(f"{STUDY / 'report.md'}: {', '.join(machines)}")


if __name__ == "__main__":
    main()
