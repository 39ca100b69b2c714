"""The page a newcomer reads after `make quickstart`: a table, two pictures, a text of each model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window; before pyplot is imported
import matplotlib.pyplot as plt


def write(folder: Path, summary: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Writes summary.json, report.md and the figures into `folder`, each whole or not at all."""
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
        "| weights | bits per byte (held out) | model file | quantized matrices in bf16 | file / bf16 matrices "
        "| tokens/s packed | tokens/s trained form | training |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['bits_per_byte']:.3f} | {row['file_bytes'] / 1e3:,.0f} kB "
            f"| {row['matrix_bfloat16_bytes'] / 1e3:,.0f} kB | {row['file_bytes'] / row['matrix_bfloat16_bytes']:.3f} "
            f"| {row['packed_tokens_per_second']:,.0f} | {row['latent_tokens_per_second']:,.0f} "
            f"| {row['training_seconds']:.0f} s |"
        )
    first = next(iter(rows.values()))
    lines += [
        "",
        f"For scale: an add-0.1 byte trigram model, counted on all of the training text, needs "
        f"{summary['trigram_bits_per_byte']:.3f} bits per byte. Each model here has {first['parameters']:,} "
        f"parameters and saw {first['training_tokens']:,} bytes of it. The file also holds the embedding "
        "(bfloat16) and the norms.",
        "",
        f"Packed matrices ran on `{summary['implementation']}` with `{summary['isa']}` code. Measured on "
        f"{summary['hardware']}; Python {summary['python']}, jax {summary['jax']}. Speeds are medians of one text "
        "at a time on a model this small: they show that the path works, not what the kernels can do.",
        "",
        "![Held-out bits per byte while training](loss_curves.png)",
        "![Quality against size](quality_and_size.png)",
        "",
    ]
    for name, row in rows.items():
        lines += [f"## What the {name} model writes", "", "```python", row["sample"].rstrip(), "```", ""]
    lines += [f"All of it took {summary['seconds'] / 60:.1f} minutes.", ""]
    return "\n".join(lines)


def _loss_curves(path: Path, summary: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in rows.items():
        axes.plot([p["step"] for p in row["curve"]], [p["bits_per_byte"] for p in row["curve"]], label=name)
    axes.axhline(summary["trigram_bits_per_byte"], color="grey", linestyle=":", label="trigram")
    axes.set(xlabel="step", ylabel="bits per byte, held out", title="Learning with fewer bits")
    axes.legend()
    _save(figure, path)


def _quality_and_size(path: Path, summary: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in rows.items():
        axes.plot(row["file_bytes"] / 1e3, row["bits_per_byte"], "o", markersize=9, label=name)
    axes.axhline(summary["trigram_bits_per_byte"], color="grey", linestyle=":", label="trigram")
    axes.set_xscale("log")
    sizes = [row["file_bytes"] / 1e3 for row in rows.values()]
    axes.set_xticks(sizes, labels=[f"{size:,.0f}" for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="model file (kB)", ylabel="bits per byte, held out", title="What the bits buy")
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
