"""Greedy continuations of held-out text at the evaluations of a run, for a reader: `samples.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from bitnet_jax.data import Tokenizer
from bitnet_jax.evaluation.completion import complete
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.models import ModelConfig
from bitnet_jax.training.config_sections import EvaluationConfig

PROMPT = 32  # tokens, or as many as leave room for the continuation


class Sample(NamedTuple):
    prompt: str
    text: str


Sampler = Callable[[Mapping[str, PyTree]], list[Sample]]  # of variables


def make_sampler(
    model: ModelConfig, tokenizer: Tokenizer, held_out: np.ndarray, evaluation: EvaluationConfig
) -> Sampler | None:
    """Continues `evaluation.samples` consecutive pieces from the start of the held-out text; None if there are none.

    The prompts have one length, so that one program is compiled, with the first samples. A continuation ends before an
    end token.

    Args:
      held_out: tokens [N].

    Raises:
      ValueError: no room for a prompt before evaluation.sample_tokens, or too little text.
    """
    if not evaluation.samples:
        return None
    length = model.known_length
    room = length - evaluation.sample_tokens
    if room < 1:
        raise ValueError(
            f"evaluation.sample_tokens: got {evaluation.sample_tokens}, expected at most {length - 1}, since the model "
            f"is trained with sequences of {length} tokens"
        )
    width = min(PROMPT, room)
    prompts = [held_out[i * width :][:width] for i in range(evaluation.samples)]
    if len(prompts[-1]) < width:
        raise ValueError(
            f"evaluation.samples: got {evaluation.samples}, expected at most {len(held_out) // width}, as many as the "
            f"held-out text has prompts of {width} tokens"
        )
    texts = [tokenizer.decode(prompt) for prompt in prompts]

    def sample(variables: Mapping[str, PyTree]) -> list[Sample]:
        answers = complete(TextModel(model, variables, tokenizer), prompts, evaluation.sample_tokens)
        return [Sample(prompt, text) for prompt, text in zip(texts, answers, strict=True)]

    return sample
