"""Adapter to lm-evaluation-harness (optional package lm-eval).

    results = run_harness(TextModel(config, variables, tokenizer), ["arc_easy"], limit=100)

Likelihoods are those of evaluation/likelihood.py, so a text begins with the begin tokens of the model,
the separator for a model trained here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.data.conversation import with_begin
from bitnet_jax.evaluation.completion import complete
from bitnet_jax.evaluation.likelihood import (
    TextModel,
    check_text_model,
    score_requests,
    text_request,
)
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.optional_packages import missing_package

NEW_TOKENS = 256  # default length of an answer; never more than half of the model's positions


class HarnessError(ValueError):
    """The harness is not installed, or does not support the request."""


def run_harness(
    model: TextModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """`results` of lm_eval.simple_evaluate: task -> metric -> value.

    Args:
      tasks: names of tasks of the harness, or of .yaml files below include_path.
      limit: number of documents per task, from the start.

    Raises:
      HarnessError: lm-eval is not installed, or a task is unknown.
      DataError: not a causal language model.
    """
    adapter = harness_model(model, progress=progress)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise HarnessError(
            f"got the harness tasks {', '.join(unknown)}, expected tasks of lm-eval; list them with `lm_eval ls "
            "tasks`, or add a folder of .yaml files with --include-path"
        )
    results = simple_evaluate(
        adapter, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
    )
    return dict(results["results"])


def harness_model(model: TextModel, *, progress: bool = False) -> Any:
    """The lm_eval.api.model.LM of a model."""
    check_text_model(model)
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise HarnessError(missing_package("lm-eval")) from error

    class BitnetJax(LM):
        """A request's `args` are (context, continuation), (text,), or (context, settings)."""

        tokenizer_name = f"bitnet_jax-{model.tokenizer.kind}-{model.tokenizer.vocab_size}"

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [text_request(model, *request.args) for request in requests]
            scores = score_requests(model, pairs, progress=progress)
            return self._cached("loglikelihood", requests, [(s.log_probability, s.greedy) for s in scores])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [text_request(model, "", request.args[0]) for request in requests]
            values = [score.log_probability for score in score_requests(model, texts, progress=progress)]
            return self._cached("loglikelihood_rolling", requests, values)

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers = [""] * len(requests)
            settings = [_generation(model, request.args[1]) for request in requests]
            for setting in dict.fromkeys(settings):
                indices = [i for i, other in enumerate(settings) if other == setting]
                new_tokens, stop, sampling = setting
                prompts = [_prompt(model, requests[i].args[0]) for i in indices]
                texts = complete(model, prompts, new_tokens, stop=stop, sampling=sampling, progress=progress)
                for i, text in zip(indices, texts, strict=True):
                    answers[i] = text
            return self._cached("generate_until", requests, answers)

        def _cached(self, kind: str, requests: list[Any], answers: list[Any]) -> list[Any]:
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial(kind, request.args, answer)
            return answers

    return BitnetJax()


def _prompt(model: TextModel, context: str) -> np.ndarray:
    return with_begin(model.begin, model.tokenizer.encode(context))


def _generation(model: TextModel, settings: dict[str, Any]) -> tuple[int, tuple[str, ...], SamplingConfig]:
    """(new tokens, stop strings, sampling) from the generation settings of a task."""
    until = settings.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(word for word in until if word)
    requested = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS)
    new_tokens = max(1, min(requested, model.config.max_length // 2))
    if not settings.get("do_sample", settings.get("temperature", 0) > 0):
        return new_tokens, stop, SamplingConfig()
    sampling = SamplingConfig(
        temperature=float(settings.get("temperature", 1.0)),
        top_k=settings.get("top_k"),
        top_p=float(settings.get("top_p", 1.0)),
    )
    return new_tokens, stop, sampling
