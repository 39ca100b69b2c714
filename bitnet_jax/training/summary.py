"""The result of a run for a reader: a table of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

WIDTH, INDENT = 80, 16
TIED = "\N{NO-BREAK SPACE}"  # between a number and its unit, while lines are broken


def summary(result: Mapping[str, Any]) -> str:
    """What `fit` returned, one line per subject.

    The sections `record`, `train` and `valid` may be missing, as they are from results of earlier versions.
    """
    lines = []
    for name, text in _subjects(result):
        broken = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False)
        wrapped = [line.replace(TIED, " ") for line in broken] or [""]
        lines += [
            f"{label:{INDENT}s}{part}" for label, part in zip([name] + [""] * WIDTH, wrapped, strict=False)
        ]
    return "\n".join(lines)


def _subjects(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "status", f"{result['status']} at step {result['step']:,} of {result['steps']:,}"
    if result.get("message"):
        yield "", result["message"]
    for name, kind in (("held out", "valid"), ("last update", "train")):
        if kind in result:
            found = [key for key in MEASUREMENTS if key in result[kind]]
            yield name, ", ".join(f"{MEASUREMENTS[key]} {number(result[kind][key])}" for key in found)
    tested = {name.removeprefix("test_"): value for name, value in result.items() if name.startswith("test_")}
    if found := [key for key in MEASUREMENTS if key in tested]:
        yield "test", ", ".join(f"{MEASUREMENTS[key]} {number(tested[key])}" for key in found)
    if "parameters" in result:
        yield "parameters", f"{result['parameters']:,}, trained on {result['tokens']:,} tokens"
    if "record" in result:
        yield from _record(result["record"])


# Measurement -> its name; others, such as statistics of the codes, are in result.json.
MEASUREMENTS = {
    "loss": "loss",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "grad_norm": "gradient norm",
    "flip_rate": "flip rate",
    "zero_fraction": "zeros",
}


def _record(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if (speed := record["tokens_per_second"]) is not None:
        yield "speed", f"{speed:,.0f} tokens/s of productive time"
    if record["mfu"] is not None:
        peak = f"{record['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s ({record['peak']})"
        yield "MFU", f"{percent(record['mfu'])} of {peak}, {record['flops_per_token']:,.0f} FLOP a token"
    else:
        unknown = (
            "no count of this model's operations" if record["flops_per_token"] is None else record["peak"]
        )
        yield "MFU", f"unknown: {unknown}"
    yield "wall time", f"{duration(record['wall_seconds'])} in {plural(record['starts'], 'start')}"
    if record["goodput"] is not None:
        yield "goodput", f"{percent(record['goodput'])} of the wall time is productive"
        spent = sorted(record["seconds"].items(), key=lambda item: -item[1])
        yield "", ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent if seconds)
    if received := record.get("received_bytes_per_update"):
        yield "communication", _traffic(received)
    memory = record["peak_memory_bytes"]
    yield "peak memory", ", ".join(f"{name} {value / 1e6:,.0f} MB" for name, value in memory.items())
    if record["joules"]:
        joules = ", ".join(f"{name} {value:,.0f} J" for name, value in record["joules"].items())
        yield "energy", f"{joules}: {number(record['joules_per_token'])} J a token"
    else:
        yield "energy", "no meter: " + "; ".join(record["meters_absent"].values())


def _traffic(received: Mapping[str, Mapping[str, int]]) -> str:
    """`one update moves 1.9 MB a device: all-gather u8 0.4, all-reduce f32 1.5`."""
    kinds = {f"{name} {kind}": size for name, sizes in received.items() for kind, size in sizes.items()}
    total = sum(kinds.values())
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if total >= s), ("B", 1.0))
    parts = ", ".join(f"{name} {value / size:.1f}" for name, value in kinds.items())
    return f"one update moves {total / size:.1f}{TIED}{unit} a device: {parts}"


def number(value: Any) -> str:
    """A measurement in four significant digits; JSON may hold "nan" and "inf"."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}{TIED}%"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}{TIED}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds / 60:.1f}{TIED}min"
    return f"{minutes // 60}{TIED}h{TIED}{minutes % 60}{TIED}min"
