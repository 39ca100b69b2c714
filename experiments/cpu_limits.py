"""Inference speed relative to the limits of this machine: the study cpu_limits, and the table of README.md.

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
README = Path(__file__).parents[1] / "README.md"
MODEL = ("-m", "bitnet_jax.cli", "bench")
KERNELS = ("-m", "bitnet_kernels.bench", "--working-set", "512", "--seconds")
TWO_B = ("--preset", "2b4t", "--prompt", "512", "--generate", "64", "--repeats", "3", "--head", "int4")
SMALL = ("--preset", "125m", "--prompt", "512", "--generate", "128", "--repeats", "5", "--head", "int4")
LONG = (*TWO_B, "--prompt", "3000", "--quick")
PEER = ("--compare", "llama.cpp")  # in turn, through llama-cpp-python
LARGE = ("--prompt", "16", "--generate", "9", "--repeats", "3", "--head", "int4", "--quick")
VNNI = (
    "avx512vbmi"  # products by dot-product instructions only; if absent, the fastest instruction set is used
)

# Rows of README.md.
TITLES = {
    "2b_ternary": "2B-4T shape, ternary", "2b_ternary5": "2B-4T shape, ternary in 1.6 bits",
    "2b_binary": "2B-4T shape, binary", "2b_ternary_long": "2B-4T shape, ternary, behind 3,000 tokens",
    "125m_ternary": "125M, ternary", "70b_ternary5": "70B, ternary in 1.6 bits", "100b_binary": "100B, binary",
}  # fmt: skip
BEGIN, END = "<!-- cpu:begin (python -m experiments.cpu_limits --report) -->", "<!-- cpu:end -->"

# Minimum weights of a product compared with the read ceiling: with fewer, call overhead exceeds reading.
SMALLEST = 2560 * 2560

# name -> (arguments of python, instruction set or None for the fastest)
COMMANDS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "kernels": ((*KERNELS, "0.6", "--suite", "all"), None),
    "kernels_vnni": ((*KERNELS, "2", "--suite", "prefill"), VNNI),
    "2b_ternary": ((*MODEL, *TWO_B, *PEER, "--recipe", "bitnet_b158"), None),
    "2b_ternary5": ((*MODEL, *TWO_B, *PEER, "--recipe", "bitnet_b158", "--ternary-format", "ternary5"), None),
    "2b_binary": ((*MODEL, *TWO_B, *PEER, "--recipe", "bitnet"), None),
    "2b_ternary_long": ((*MODEL, *LONG, *PEER, "--recipe", "bitnet_b158"), None),
    "125m_ternary": ((*MODEL, *SMALL, *PEER, "--recipe", "bitnet_b158"), None),
    "125m_binary": ((*MODEL, *SMALL, *PEER, "--recipe", "bitnet"), None),
    "100b_binary": ((*MODEL, *LARGE, "--preset", "100b", "--recipe", "bitnet"), None),
    "70b_ternary5": (
        (*MODEL, *LARGE, "--preset", "70b", "--recipe", "bitnet_b158", "--ternary-format", "ternary5"), None,
    ),
    "neighbour": (("-m", "experiments.neighbour"), None),
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
        lines += [f"# {name}: {_hardware(next(iter(results.values()))['provenance'])}", ""]
        if "kernels" in results:
            lines += _bar_table(results)
        lines += _model_table({n: f for n, f in results.items() if "decode_tokens_per_second" in f})
        lines += _extended_table(results)
        lines += _neighbour_table(results.get("neighbour"))
        for part, title in {
            "kernels": "Products on the fastest instruction set",
            "kernels_vnni": f"Products of many rows on {VNNI}",
        }.items():
            lines += _kernel_table(title, results[part]) if part in results else []
        lines += _cost_table(results["training_cost"]) if "training_cost" in results else []
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
            and (name != "ceiling_fraction" or row.get("read_ceiling_loop"))
        ]

    def against(name: str, part: str) -> list[float]:
        return [results[name]["compare"][f"{part}_ratio"]] if "compare" in results.get(name, {}) else []

    def starts(name: str) -> list[float]:
        figures = results.get(name, {})
        return [
            figures[f"first_token_seconds_{cache}"] for cache in ("warm", "cold") if "one_thread" in figures
        ]

    def memory(name: str) -> list[float]:
        resident = results.get(name, {}).get("resident_bytes")
        return [resident / 1e6] if resident else []

    def honest(figures: dict[str, Any]) -> list[float]:
        """Without the loop that measured it, a ceiling is that of an earlier loop, which was too low."""
        return [figures["ceiling_fraction"]] if figures.get("read_ceiling_loop") else []

    models = [figures for figures in results.values() if "kernel_fraction" in figures]
    fork_join = [row["microseconds"] for row in rows if row["op"] == "fork_join"]
    vnni = results["kernels_vnni"]["rows"]
    cost = results["training_cost"]["cost_against_float32"]
    decode = products("ceiling_fraction", rows, "ternary2", 1)
    ternary = products("peak_fraction", vnni, "ternary2", 128)
    binary = products("peak_fraction", rows, "binary", 128)
    quantizing = [cost[name]["median"] for name in ("bitnet_b158", "bitnet")]
    return [
        ("ternary2, one row of x: fraction of the read ceiling", "0.85", "0.92", decode),
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
        *(
            (f"{title}, {part}, times llama.cpp in turn", must, aim, against(name, part))
            for title, name, part, must, aim in (
                ("2B-4T ternary", "2b_ternary", "decode", "1.5", "1.7"),
                ("2B-4T ternary", "2b_ternary", "prefill", "1.5", "1.7"),
                ("2B-4T ternary, five digits a byte", "2b_ternary5", "decode", "1.5", "1.7"),
                ("2B-4T ternary behind 3,000 tokens", "2b_ternary_long", "decode", "1.6", "1.9"),
                ("2B-4T binary", "2b_binary", "decode", "2.3", "2.8"),
                ("2B-4T binary", "2b_binary", "prefill", "5", "5.5"),
                ("125M ternary", "125m_ternary", "decode", "2.2", "3"),
            )
        ),
        *(
            (f"{title}, start to first token, seconds", must, aim, starts(name))
            for title, name, must, aim in (
                ("2B-4T ternary", "2b_ternary", "2.0 warm, 5 cold", "1.2"),
                ("125M ternary", "125m_ternary", "1.5 warm, 3 cold", "0.9"),
            )
        ),
        *(
            (f"{title}, memory of a generation, MB", must, aim, memory(name))
            for title, name, must, aim in (
                ("2B-4T ternary", "2b_ternary", "1100", "950"),
                ("125M ternary", "125m_ternary", "300", "200"),
            )
        ),
        (
            "8 sequences together, times one",
            "4",
            "6",
            [f["batch8_speedup"] for f in models if f.get("batch8_speedup")],
        ),
        (
            "100B binary: fraction of the read ceiling",
            "0.80",
            "0.90",
            honest(results.get("100b_binary", {})),
        ),
        ("fake quantization: overhead of a training step", "0.15", "0.05", quantizing),
    ]


def _bar_table(results: dict[str, Any]) -> list[str]:
    rows = [
        (part, must, aim, " to ".join(f"{end(figures):.2f}" for end in ((min, max) if len(figures) > 1 else (min,))))
        for part, must, aim, figures in bars(results)
        if figures
    ]  # fmt: skip
    return ["## Requirements", "", *_table(("quantity", "required", "target", "measured"), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = ["---"] + ["--:"] * (len(head) - 1)
    return [*(f"| {' | '.join(cells)} |" for cells in (head, align, *rows)), ""]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _model_table(models: dict[str, dict[str, Any]]) -> list[str]:
    head = ("model", "ran on", "prompt", "prefill tokens/s", "of dot peak", "decode tokens/s", "bytes per token",
            "of read ceiling", "kernels / step", "head", "KV", "memory")  # fmt: skip
    rows = [
        (
            name,
            f["isa"],
            str(f["prompt"]),
            f"{f['prefill_tokens_per_second']:.0f}",
            f"{_percent(f['prefill_peak_fraction'])} of {f['dot_peak_gmacs_per_second']:.0f} GMAC/s",
            f"{f['decode_tokens_per_second']:.2f}",
            f"{f['bytes_per_token'] / 1e6:,.0f} MB",
            f"{_percent(f['ceiling_fraction'])} of {f['read_ceiling_gbytes_per_second']:.1f} GB/s"
            if f.get("read_ceiling_loop")
            else "-",
            _percent(f["kernel_fraction"]),
            f["head_format"],
            f["kv_format"],
            f"{f['peak_rss_bytes'] / 1e9:.1f} GB, {f['rss_anon_bytes'] / 1e9:.2f} outside the file",
        )
        for name, f in models.items()
    ]
    return ["## Whole models, random weights of the real shape", "", *_table(head, rows)]


def _extended_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """What the bench measures beside one sequence on all threads, and llama.cpp in turn."""
    models = {name: f for name, f in results.items() if f.get("one_thread")}
    if not models:
        return []
    head = ("model", "first token warm, cold, s", "prompt of it", "memory of a generation",
            "one thread: decode, prefill", "8 together", "by KV format",
            "llama.cpp in turn: decode", "prefill", "its types")  # fmt: skip

    def ratio(f: dict[str, Any], part: str) -> str:
        if "compare" not in f:
            return "-"
        theirs = f["compare"][f"peer_{part}_tokens_per_second"]
        return (
            f"{f['compare'][f'{part}_ratio']:.2f} times "
            f"{theirs['median']:.1f} [{theirs['lowest']:.1f}, {theirs['highest']:.1f}]"
        )

    rows = [
        (
            name,
            f"{f['first_token_seconds_warm']:.2f}, {f['first_token_seconds_cold']:.2f}",
            str(f.get("first_token_prompt", f["prompt"])),
            f"{f['resident_bytes'] / 1e6:,.0f} MB" if "resident_bytes" in f else "-",
            f"{f['one_thread']['decode_tokens_per_second']:.1f}, {f['one_thread']['prefill_tokens_per_second']:.0f}",
            f"{f['batch8_tokens_per_second']:.0f} ({f['batch8_speedup']:.2f} times one)",
            ", ".join(
                f"{kv} {speed:.1f}" for kv, speed in f["decode_tokens_per_second_by_kv_format"].items()
            ),
            ratio(f, "decode"),
            ratio(f, "prefill"),
            f.get("compare", {}).get("peer_types", "-"),
        )
        for name, f in models.items()
    ]
    return ["## Start, threads, batches, and llama.cpp in turn", "", *_table(head, rows)]


def _neighbour_table(figures: dict[str, Any] | None) -> list[str]:
    if figures is None:
        return []

    def speed(row: dict[str, Any], side: str) -> str:
        if f"{side}_share" not in row:
            return "-"
        return f"{row[f'{side}_tokens_per_second']:.1f} ({_percent(row[f'{side}_share'])})"

    rows = [
        (str(row["busy_processes"]), _percent(row["fair_share"]), speed(row, "ours"), speed(row, "peer"))
        for row in figures["rows"]
    ]
    head = ("busy processes", "fair share", "decode tokens/s", "llama.cpp in turn")
    return [f"## Beside other processes: {figures['preset']}, {figures['recipe']}", "", *_table(head, rows)]


def readme_table(machines: dict[str, dict[str, Any]]) -> str:
    """The table of README.md: models that were timed in turn with llama.cpp."""
    head = (
        "model",
        "decode, tokens/s",
        "prompt of 512",
        "against llama.cpp in turn",
        "start to first token (its prompt)",
        "memory",
    )
    rows = []
    for results in machines.values():
        for name, title in TITLES.items():
            f = results.get(name, {})
            if "compare" not in f and not f.get("read_ceiling_loop"):
                continue
            ratios = f.get("compare")
            start = f.get("first_token_seconds_warm")
            rows.append(
                (
                    f"{title} ({f['provenance']['threads']} threads of {f['provenance']['processor']}, {f['isa']})",
                    f"{f['decode_tokens_per_second']:.1f}",
                    f"{f['prefill_tokens_per_second']:.0f} tokens/s" if f["prompt"] == 512 else "-",
                    f"{ratios['decode_ratio']:.1f} and {ratios['prefill_ratio']:.1f} times"
                    if ratios
                    else "-",
                    f"{start:.1f} s ({f.get('first_token_prompt', f['prompt'])} tokens)" if start else "-",
                    f"{(f.get('resident_bytes') or f['peak_rss_bytes']) / 1e9:.2f} GB",
                )
            )
    return "\n".join(_table(head, rows)[:-1])


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
                _percent(row.get("ceiling_fraction") if row.get("read_ceiling_loop") else None),
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


def _hardware(provenance: dict[str, Any]) -> str:
    return provenance.get("hardware") or f"{provenance['threads']} threads of {provenance['processor']}"


def _provenance_table(results: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, figures in results.items():
        by = figures["provenance"]
        rows.append(
            (
                name,
                by["commit"],
                by.get("date", "-"),
                _hardware(by),
                f"jax {by['jax']}, Python {by['python']}",
            )
        )
    return ["## Measured with", "", *_table(("result", "commit", "date", "hardware", "versions"), rows)]


def with_table(readme: str, machines: dict[str, dict[str, Any]]) -> str:
    """README.md with the table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{readme_table(machines)}\n{END}{rest.split(END)[1]}"


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
    README.write_text(with_table(README.read_text(), machines))
    print(f"{STUDY / 'report.md'}: {', '.join(machines)}")


if __name__ == "__main__":
    main()
