"""Models of this package and of llama.cpp beside each other: the same tokens, timed in turn in one process.

    models = {"ours": ours(load_model(folder), prompt, 64), "llama.cpp": llama_cpp(file, prompt, 64)}
    seconds = in_turn(models, rounds=7)

llama.cpp takes part through the package llama-cpp-python.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from bitnet_jax.evaluation.language import evaluate_text
from bitnet_jax.model_folders import LoadedModel
from bitnet_jax.optional_packages import missing_package
from bitnet_jax.tools.model_bench import generation_calls
from bitnet_kernels.processors import threads
from bitnet_kernels.timing import Spread, interleaved

PARTS = ("prefill", "decode")


class Model(NamedTuple):
    nats: Callable[[np.ndarray], float]  # mean nats per token of ids [T] after the first
    prefill: Callable[[int], Any]  # reads the prompt and chooses the first new token
    decode: Callable[[int], Any]  # makes the other new tokens


def ours(
    model: LoadedModel[Any], prompt: Int[np.ndarray, "T"], new_tokens: int, kv_format: str | None = None
) -> Model:
    """A loaded language model; its decode loop is one program."""

    def nats(ids: np.ndarray) -> float:
        score = evaluate_text(
            model.config, model.variables, ids, np.ones_like(ids), length=len(ids) - 1, batch_size=1
        )
        return score.nats_per_token

    return Model(nats, *generation_calls(model.config, model.variables, prompt[None], new_tokens, kv_format))


def llama_cpp(file: Path, prompt: Int[np.ndarray, "T"], new_tokens: int, longest: int = 1024) -> Model:
    """A GGUF file in llama.cpp, on as many threads as ours has.

    Args:
      longest: maximum number of ids that `nats` gets, less one.

    Raises:
      ImportError: llama-cpp-python is not installed.
    """
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise ImportError(missing_package("llama-cpp-python")) from error

    settings: dict[str, Any] = {"n_threads": threads(), "n_threads_batch": threads(), "verbose": False}
    running = Llama(str(file), n_ctx=len(prompt) + new_tokens, n_batch=len(prompt), **settings)

    @functools.cache
    def scorer() -> Any:  # only where it is needed: it holds the logits of all positions
        return Llama(str(file), n_ctx=longest, n_batch=longest, logits_all=True, **settings)

    def nats(ids: np.ndarray) -> float:
        scoring = scorer()
        scoring.reset()
        scoring.eval(ids[:-1].tolist())
        logits = np.asarray(scoring.scores[: len(ids) - 1], np.float64)
        largest = logits.max(1)
        normalizers = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
        return float(np.mean(normalizers - logits[np.arange(len(ids) - 1), ids[1:]]))

    def next_token() -> int:
        # Without logits_all, llama-cpp-python keeps no copy of the logits; these are llama.cpp's own.
        logits = np.ctypeslib.as_array(running._ctx.get_logits(), shape=(running.n_vocab(),))
        return int(np.argmax(logits))

    token = [0]

    def prefill(round: int) -> None:
        running.reset()
        running.eval(prompt.tolist())
        token[0] = next_token()

    def decode(round: int) -> None:
        for _ in range(new_tokens - 1):
            running.eval(token)
            token[0] = next_token()

    return Model(nats, prefill, decode)


def llama_cpp_version() -> str | None:
    """The version of llama-cpp-python and what its llama.cpp says of its build; None where it is not installed."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    from llama_cpp import llama_print_system_info

    return f"{version} ({llama_print_system_info().decode().strip()})"


def in_turn(models: Mapping[str, Model], rounds: int) -> dict[tuple[str, str], Spread]:
    """(model, "prefill" or "decode") -> seconds; all models are timed in each round, after one that is not counted."""
    calls = {(name, part): getattr(model, part) for name, model in models.items() for part in PARTS}
    return interleaved(calls, rounds=(rounds, rounds), warmup=1)
