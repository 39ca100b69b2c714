"""The report of `make quickstart`: a table, two figures, and a generated text of each model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # headless; must precede the import of pyplot
import matplotlib.pyplot as plt


def write(folder: Path, summary: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Writes summary.json, report.md and the figures into `folder`, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    _loss_curves(folder / "loss_curves.png", summary, rows)
    _quality_and_size(folder / "quality_and_size.png", summary, rows)
    _replace(folder / "report.md", _report(summary, rows))
    _replace(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _report(summary: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    equal = "the same model" if summary["packed_equals_latent"] else "NOT the same model"
    lines = [
        "# Quickstart: one model, three precisions",
        "",
        f"Packed and trained form are **{equal}**: equal codes in every matrix, and at least "
        f"{summary['tokens_identical']:,} greedy tokens of each precision identical.",
        "",
        "| weights | bits per byte, held out | model file | its matrices in bf16 | training "
        f"| tokens/s at {summary['preset']} | file at {summary['preset']} |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['bits_per_byte']:.3f} | {row['file_bytes'] / 1e3:,.0f} kB "
            f"| {row['matrix_bfloat16_bytes'] / 1e3:,.0f} kB | {row['training_seconds']:.0f} s "
            f"| {row['preset_tokens_per_second']:,.0f} | {row['preset_bytes'] / 1e6:,.0f} MB |"
        )
    lines.append(f"| *byte trigram* | *{summary['trigram_bits_per_byte']:.3f}* | | | | | |")
    first = next(iter(rows.values()))
    lines += [
        "",
        f"Each model has {first['parameters']:,} parameters and saw {first['training_tokens']:,} tokens (byte-level "
        "BPE) of the source text of Python's standard library. The table and the curves use the same held-out windows; "
        "the trigram (add 0.1) is counted on all of the training text and measured on the same held-out text. The "
        "file also contains the embedding (bfloat16) and the norms, which dominate a model this small. With one seed, "
        "nothing can be said about the ranking of ternary and binary.",
        "",
        f"Speed is measured by decoding one text with random weights of the shape {summary['preset']}; "
        "`bitnet-jax bench --preset 2b4t` measures a 2B model. "
        f"Packed matrices ran on `{summary['implementation']}` with `{summary['isa']}` code. Measured "
        f"on {summary['hardware']}; Python {summary['python']}, jax {summary['jax']}.",
        "",
        "![Held-out bits per byte while training](loss_curves.png)",
        "![Quality against size](quality_and_size.png)",
        "",
    ]
    for name, row in rows.items():
        lines += [f"## Text of the {name} model", "", "```python", row["sample"].rstrip(), "```", ""]
    lines += [f"Total time: {summary['seconds'] / 60:.1f} minutes.", ""]
    return "\n".join(lines)


COLOURS = {"float32": "tab:gray", "ternary": "tab:blue", "binary": "tab:orange"}


def _loss_curves(path: Path, summary: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in rows.items():
        steps, bits = ([point[key] for point in row["curve"]] for key in ("step", "bits_per_byte"))
        axes.plot(steps, bits, color=COLOURS[name], marker="o", markersize=3, label=f"{name} {bits[-1]:.2f}")
    _trigram(axes, summary)
    axes.set(xlabel="update", ylabel="bits per byte, held out", title="Training with fewer bits")
    axes.legend(frameon=False)
    _save(figure, path)


def _quality_and_size(path: Path, summary: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in rows.items():
        size, bits = row["file_bytes"] / 1e3, row["bits_per_byte"]
        axes.plot(size, bits, "o", markersize=10, color=COLOURS[name])
        axes.annotate(
            f"{name}\n{size:,.0f} kB", (size, bits), (0, 12), textcoords="offset points", ha="center"
        )
    _trigram(axes, summary)
    axes.set_xscale("log")
    axes.set_xlim(min(row["file_bytes"] for row in rows.values()) / 1.6e3, None)
    axes.margins(x=0.2, y=0.3)
    axes.set_xticks([])
    axes.minorticks_off()
    axes.set(xlabel="model file (log scale)", ylabel="bits per byte, held out", title="Quality against size")
    _save(figure, path)


def _trigram(axes: Any, summary: dict[str, Any]) -> None:
    bits = summary["trigram_bits_per_byte"]
    axes.axhline(bits, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        f"byte trigram {bits:.2f}", (0.99, bits), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="bottom",
    )  # fmt: skip


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
