"""Interleaved timing of this package and llama.cpp on random weights of the same shape.

    figures = compare(folder, "llama.cpp", prompt=512, new_tokens=64, rounds=3)

The peer is the user's own `llama-bench`, a new process in every round, or llama.cpp through the package
llama-cpp-python, loaded once. It gets as many threads as this package has, and its default cache (float16).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.inference.cache import default_kv_format
from bitnet_jax.models import text_config
from bitnet_jax.packed import storage
from bitnet_jax.progress import progress_bar
from bitnet_jax.tools.model_bench import generation_calls, head_format
from bitnet_jax.tools.random_gguf import TYPE_OF, write_random_gguf
from bitnet_jax.tools.side_by_side import llama_cpp, llama_cpp_version
from bitnet_kernels.processors import threads

PYTHON = "llama.cpp"  # by llama-cpp-python; any other peer is the path of a llama-bench
Speeds = tuple[float, float]  # prompt tokens and new tokens per second


def compare(
    folder: str | Path,
    peer: str,
    *,
    prompt: int,
    new_tokens: int,
    rounds: int = 3,
    kv_format: str | None = None,
) -> dict[str, Any]:
    """Medians and ranges of both, and the ratio of this package's median to the peer's.

    Args:
      folder: a packed model with one format for all matrices of its layers.
      peer: "llama.cpp", or the path of a llama-bench.

    Raises:
      ImportError: llama-cpp-python is not installed.
      ValueError: no llama-bench at the path, its output is not as expected, or a model that llama.cpp has no type for.
    """
    config, variables, *_ = storage.load_packed(folder)
    config = text_config(config)
    kv_format = kv_format or default_kv_format(config, variables)
    formats = {leaf["weight"].format for leaf in _layers(variables["packed"])}
    if len(formats) != 1:
        raise ValueError(
            f"got layers of {len(formats)} formats, expected one: a file of llama.cpp is to have its type"
        )
    matrices, head = TYPE_OF[formats.pop()], TYPE_OF[head_format(config, variables)]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, prompt))
    calls = generation_calls(config, variables, tokens, new_tokens, kv_format)
    with tempfile.TemporaryDirectory(prefix="bitnet-peer-") as place:
        file = Path(place) / "model.gguf"
        write_random_gguf(file, config, matrices=matrices, head=head)
        theirs = (
            _in_python(file, tokens[0], new_tokens)
            if peer == PYTHON
            else _by_command(peer, file, prompt, new_tokens)
        )
        sides = {"ours": lambda: _timed(calls, prompt, new_tokens), "peer": theirs}
        speeds: dict[str, list[Speeds]] = {name: [] for name in sides}
        with progress_bar(rounds + 1, unit="round", description=f"in turn with {peer}") as bar:
            for round in range(rounds + 1):  # the first is not counted: it compiles, and reads the files
                for name, run in sides.items():
                    measured = run()
                    speeds[name] += [measured] if round else []
                bar.update()
        size = file.stat().st_size
    figures: dict[str, Any] = {
        "peer": f"llama-cpp-python {llama_cpp_version()}" if peer == PYTHON else peer,
        "peer_types": f"{matrices}, head {head}",
        "peer_bytes": size,
        "rounds": rounds,
        "kv_format": kv_format,
        "threads": threads(),
    }
    for part, index in {"prefill": 0, "decode": 1}.items():
        both = {name: [speed[index] for speed in of_side] for name, of_side in speeds.items()}
        for name, values in both.items():
            figures[f"{name}_{part}_tokens_per_second"] = {
                "median": statistics.median(values), "lowest": min(values), "highest": max(values),
            }  # fmt: skip
        figures[f"{part}_ratio"] = statistics.median(both["ours"]) / statistics.median(both["peer"])
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures as text."""

    def side(name: str, part: str) -> str:
        return "{median:.2f} [{lowest:.2f}, {highest:.2f}]".format(
            **figures[f"{name}_{part}_tokens_per_second"]
        )

    lines = [f"in turn with {figures['peer']}: {figures['peer_types']}, {figures['rounds']} rounds, tokens/s"]
    for part in ("prefill", "decode"):
        lines.append(
            f"  {part:8} ours {side('ours', part)}, peer {side('peer', part)}: {figures[f'{part}_ratio']:.2f} times"
        )
    return "\n".join(lines)


def _layers(packed: dict[str, Any]) -> list[dict[str, Any]]:
    """The matrices in the blocks of a model."""
    return [
        matrix
        for name, block in packed.items()
        if name.startswith("layers_")
        for part in block.values()
        for matrix in part.values()
    ]


def _timed(calls: tuple[Callable[[int], Any], Callable[[int], Any]], prompt: int, new_tokens: int) -> Speeds:
    prefill, decode = calls
    times = [time.perf_counter()]
    for call in (prefill, decode):
        call(0)
        times.append(time.perf_counter())
    return prompt / (times[1] - times[0]), (new_tokens - 1) / (times[2] - times[1])


def _in_python(file: Path, prompt: np.ndarray, new_tokens: int) -> Callable[[], Speeds]:
    model = llama_cpp(file, prompt, new_tokens)
    return lambda: _timed((model.prefill, model.decode), len(prompt), new_tokens)


def _by_command(program: str, file: Path, prompt: int, new_tokens: int) -> Callable[[], Speeds]:
    """A llama-bench that reads the prompt, and generates behind it, once."""
    command = [program, "-m", str(file), "-t", str(threads()), "-r", "1", "-o", "json"]
    command += ["-p", str(prompt), "-n", "0", "-pg", f"{prompt},{new_tokens - 1}"]

    def run() -> Speeds:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ValueError(
                f"got --compare {program}, expected llama.cpp or the path of a llama-bench ({error})"
            ) from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{program} failed with exit code {done.returncode}: {last}")
        try:
            tests = {(row["n_prompt"], row["n_gen"]): float(row["avg_ts"]) for row in json.loads(done.stdout)}
            both = (prompt + new_tokens - 1) / tests[prompt, new_tokens - 1]
            return tests[prompt, 0], (new_tokens - 1) / (both - prompt / tests[prompt, 0])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{program}: got output without the tests of {prompt} prompt and {new_tokens - 1} new tokens, expected "
                "the JSON of a llama-bench of 2024 or later"
            ) from error

    return run
