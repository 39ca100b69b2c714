"""Seconds from the start of a process to the first token, with an empty and with a filled compilation cache.

    figures = first_token_seconds(folder, prompt=512, kv_format="bfloat16")

Each measurement is a separate process, `python -m bitnet_jax.tools.first_token`: it loads the model, reads the prompt
and prints a line when the first token is there, and another one when the second chunk is. The operating system has the
model's file in memory from earlier reads.
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

NEW_TOKENS = 17  # the first one and a chunk of the decode loop
WARM_STARTS = 3


def first_token_seconds(folder: str | Path, *, prompt: int, kv_format: str) -> dict[str, float]:
    """`first_token_seconds_cold`, `first_token_seconds_warm` and, of the pause after it, `second_chunk_seconds_*`.

    Args:
      folder: a packed model.
      prompt: number of random prompt tokens.

    Raises:
      RuntimeError: the process failed; with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="bitnet-programs-") as cache:
        cold = _start(folder, prompt, kv_format, cache)
        warm = [_start(folder, prompt, kv_format, cache) for _ in range(WARM_STARTS)]
    return {
        "first_token_seconds_cold": cold[0],
        "first_token_seconds_warm": statistics.median(first for first, _ in warm),
        "second_chunk_seconds_cold": cold[1],
        "second_chunk_seconds_warm": statistics.median(second for _, second in warm),
    }


def _start(folder: str | Path, prompt: int, kv_format: str, cache: str) -> tuple[float, float]:
    """Seconds from the start to the first token, and from there to the second chunk."""
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
        times = []
        for _ in process.stdout or ():
            times.append(time.perf_counter() - began)
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode or len(times) != 2:
        raise RuntimeError(
            f"the start of {folder} failed: {(errors.strip().splitlines() or ['no message'])[-1]}"
        )
    return times[0], times[1] - times[0]


def main(folder: str, prompt: str, kv_format: str) -> None:
    """Loads the model and generates, as `bitnet-jax generate` does, with a line for each chunk."""
    collect_less()
    use_compilation_cache()
    import numpy as np

    from bitnet_jax.inference.generation import stream_tokens
    from bitnet_jax.model_folders import load_text_model

    model = load_text_model(folder)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, int(prompt)))
    for _ in stream_tokens(
        model.config, model.variables, tokens, max_new_tokens=NEW_TOKENS, kv_format=kv_format
    ):
        print("chunk", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
