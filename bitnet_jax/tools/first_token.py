"""Processes that generate: seconds from their start to the first token, and their memory.

    figures = start_figures(folder, prompt=512, kv_format="bfloat16")

Each measurement is a separate process, `python -m bitnet_jax.tools.first_token`: it loads the model, reads a prompt and
prints a line when the first token is there, another one when the second chunk is, and at last its peak memory. The
operating system has the model's file in memory from earlier reads.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitnet_jax.inference.startup import collect_less, use_compilation_cache

PROMPT = 16  # tokens; a longer one adds the time of reading it, which the bench reports as prefill
NEW_TOKENS = 17  # the first one and a chunk of the decode loop
WARM_STARTS = 3


def start_figures(folder: str | Path, *, prompt: int, kv_format: str) -> dict[str, float]:
    """Time and memory of processes that generate.

    first_token_seconds_*     from the start to the first token behind `first_token_prompt` tokens (at most PROMPT),
    second_chunk_seconds_*    with an empty (cold) and a filled (warm) compilation cache; and of the pause after it
    resident_bytes            peak of all memory, the mapped model included, for `prompt` tokens and a filled cache

    Args:
      folder: a packed model.

    Raises:
      RuntimeError: the process failed; with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="bitnet-programs-") as cache:
        short = min(PROMPT, prompt)
        cold = _start(folder, short, kv_format, cache)
        warm = [_start(folder, short, kv_format, cache) for _ in range(WARM_STARTS)]
        *_, resident = [_start(folder, prompt, kv_format, cache)[2] for _ in range(2)]
    return {
        "first_token_seconds_cold": cold[0],
        "first_token_seconds_warm": statistics.median(first for first, *_ in warm),
        "second_chunk_seconds_cold": cold[1],
        "second_chunk_seconds_warm": statistics.median(second for _, second, _ in warm),
        "first_token_prompt": short,
        "resident_bytes": resident,
    }


def _start(folder: str | Path, prompt: int, kv_format: str, cache: str) -> tuple[float, float, int]:
    """Seconds from the start to the first token, and from there to the second chunk; peak memory in bytes."""
    # JAX's own variable would override the cache folder.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "bitnet_jax.tools.first_token", str(folder), str(prompt), kv_format]
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        env=environment | {"BITNET_JAX_CACHE": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        times, lines = [], []
        for line in process.stdout or ():
            times.append(time.perf_counter() - began)
            lines.append(line)
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode or len(times) != 3:
        raise RuntimeError(
            f"the start of {folder} failed: {(errors.strip().splitlines() or ['no message'])[-1]}"
        )
    return times[0], times[1] - times[0], int(lines[2])


def main(folder: str, prompt: str, kv_format: str) -> None:
    """Loads the model and generates, as `bitnet-jax generate` does, with a line for each chunk and the peak memory."""
    collect_less()
    use_compilation_cache()
    import numpy as np

    from bitnet_jax.inference.generation import stream_tokens
    from bitnet_jax.model_folders import load_text_model
    from bitnet_kernels.machine import peak_rss

    model = load_text_model(folder)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, int(prompt)))
    for _ in stream_tokens(
        model.config, model.variables, tokens, max_new_tokens=NEW_TOKENS, kv_format=kv_format
    ):
        print("chunk", flush=True)
    print(peak_rss(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
