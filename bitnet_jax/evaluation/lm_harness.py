"""Adapter to lm-evaluation-harness (optional package lm-eval).

    results = run_harness(TextModel(config, variables, tokenizer), ["arc_easy"], limit=100)

The class for the harness's own command line is tools/lm_eval_model.py; what a request means is in harness_requests.py.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.evaluation.completion import complete
from bitnet_jax.evaluation.harness_requests import (
    HarnessError,
    chat_prompt,
    generation,
    pair_request,
    prefix_id,
    prompt_of,
    rolling_request,
)
from bitnet_jax.evaluation.likelihood import TextModel, check_text_model, score_requests
from bitnet_jax.optional_packages import missing_package

try:
    from lm_eval.api.model import LM
except ImportError:  # reported by `check_harness`
    LM = object


def check_harness() -> None:
    """Raises HarnessError: the harness cannot be imported."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise HarnessError(missing_package("lm-eval")) from error


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
    adapter = HarnessModel(model, progress=progress)
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


class HarnessModel(LM):
    """The lm_eval.api.model.LM of a model. A request's `args` are (context, continuation), (text,), or (context,
    generation settings).

    Args:
      prefix_token_id: the token before a text without context; None: see `prefix_id`.
      progress: show progress bars.

    Raises:
      HarnessError: lm-eval is not installed, or prefix_token_id is not a token of the model.
      DataError: not a causal language model.
    """

    def __init__(
        self, model: TextModel, *, prefix_token_id: int | None = None, progress: bool = False
    ) -> None:
        check_text_model(model)
        check_harness()
        super().__init__()
        vocab_size = model.config.vocab_size
        if prefix_token_id is not None and not (
            type(prefix_token_id) is int and 0 <= prefix_token_id < vocab_size
        ):
            raise HarnessError(f"prefix_token_id: got {prefix_token_id!r}, expected 0 to {vocab_size - 1}")
        self.model, self._prefix, self._progress = model, prefix_token_id, progress

    @property
    def prefix_token_id(self) -> int:
        return prefix_id(self.model, self._prefix)

    @property
    def tokenizer_name(self) -> str:
        """Names what the prompts of a task depend on: the harness caches them under it."""
        tokenizer = self.model.tokenizer
        digest = hashlib.sha256((tokenizer.to_json() + self.model.stated.to_json()).encode()).hexdigest()
        return f"bitnet_jax-{tokenizer.kind}-{tokenizer.vocab_size}-{digest[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses; None: it is not used."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str) and chat_template != "default":
            warnings.warn(
                f"got the chat template {chat_template!r}, but the model has one only; it is used",
                stacklevel=2,
            )
        template = self.model.stated.template
        if template is None:
            raise HarnessError("got a model without a chat template, expected one for --apply_chat_template")
        return template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return chat_prompt(self.model, chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            context, continuation = request.args
            pairs.append(pair_request(self.model, context, continuation, self._prefix))
        scores = score_requests(self.model, pairs, progress=self._progress)
        return self._cached("loglikelihood", requests, [(s.log_probability, s.greedy) for s in scores])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        texts = [rolling_request(self.model, request.args[0], self._prefix) for request in requests]
        scored = score_requests(
            self.model, [text for text in texts if text is not None], progress=self._progress
        )
        scores = iter(scored)
        values = [0.0 if text is None else next(scores).log_probability for text in texts]
        return self._cached("loglikelihood_rolling", requests, values)

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = [""] * len(requests)
        positions = self.model.config.max_length
        settings = [generation(request.args[1], positions) for request in requests]
        prompts = [prompt_of(self.model, request.args[0], self._prefix) for request in requests]
        beyond = [
            len(prompt) + setting.new_tokens - positions
            for prompt, setting in zip(prompts, settings, strict=True)
        ]
        if max(beyond, default=0) > 0:
            warnings.warn(
                f"{sum(tokens > 0 for tokens in beyond)} prompts with their answers exceed the {positions} positions "
                f"of the model; up to {max(beyond)} tokens are left out at their start",
                stacklevel=2,
            )
        for setting in dict.fromkeys(settings):
            indices = [i for i, other in enumerate(settings) if other == setting]
            texts = complete(
                self.model,
                [prompts[i] for i in indices],
                setting.new_tokens,
                stop=setting.stop,
                sampling=setting.sampling,
                progress=self._progress,
            )
            for i, text in zip(indices, texts, strict=True):
                answers[i] = text
        return self._cached("generate_until", requests, answers)

    def _cached(self, kind: str, requests: list[Any], answers: list[Any]) -> list[Any]:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def with_begin_tokens(model: TextModel, add: bool) -> TextModel:
    """The model with (or without) begin tokens before every text, whatever it states.

    Raises:
      HarnessError: begin tokens are asked for, and the model states none.
    """
    stated = model.stated
    begin = (stated.begin or (prefix_id(model),)) if add else ()
    return model._replace(
        conversation=Conversation(begin, stated.end, stated.template, stated.special_tokens)
    )
