"""Batched completions against single ones; ROUGE and reference summaries."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.data import ByteTokenizer, DataError
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.evaluation import completion, summaries, summarization
from bitnet_jax.evaluation.completion import complete, cut
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.summaries import CUE
from bitnet_jax.evaluation.summarization import rouge
from bitnet_jax.inference.generation import generate
from bitnet_jax.models import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, max_length=60, precision="float32"
)


@pytest.fixture(scope="module")
def model() -> TextModel:
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, params)
    return TextModel(CONFIG, {"params": params}, ByteTokenizer())


@pytest.mark.extended
def test_batched_completions_equal_single_completions(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "MAX_ROWS", 2)
    prompts = [ByteTokenizer().encode(text) for text in ("ab", "c" * 35, "The quick", "x" * 80)]
    answers = complete(model, prompts, 10)
    for prompt, answer in zip(prompts, answers, strict=True):
        kept = prompt[-50:]  # the longest one is truncated at its beginning
        result = generate(CONFIG, model.variables, kept[None], max_new_tokens=10, eos_ids=(0,))
        ids = np.asarray(result.tokens)[0, : int(result.lengths[0])]
        assert answer == ByteTokenizer().decode(ids[ids != 0])
    assert len(set(answers)) > 1
    letter = next(character for character in answers[0] if character.isprintable())
    assert complete(model, prompts[:1], 10, stop=("never", letter)) == [answers[0].partition(letter)[0]]


def test_answers_end_at_every_end_token_that_the_model_states(model: TextModel) -> None:
    prompt = np.array([65, 66, 67])
    result = generate(CONFIG, model.variables, prompt[None], max_new_tokens=10)
    ids = np.asarray(result.tokens)[0].tolist()
    for end in ((ids[1],), (ids[2],), (ids[2], ids[1])):
        (answer,) = complete(model._replace(conversation=Conversation(end=end)), [prompt], 10)
        assert answer == ByteTokenizer().decode(ids[: min(map(ids.index, end))])


def test_a_completion_ends_before_the_first_stop_string() -> None:
    assert cut("a. b\nc", ("\n", ".")) == "a"
    assert cut("a. b", ("\n",)) == "a. b"
    assert cut("a", ()) == "a"


def test_invalid_completions_are_rejected(model: TextModel) -> None:
    for count in (0, 60):
        with pytest.raises(DataError, match=f"max_new_tokens: got {count}, expected 1 to 59"):
            complete(model, [np.array([1])], count)
    with pytest.raises(DataError, match="got an empty prompt"):
        complete(model, [np.array([1]), np.array([], int)], 5)


def test_rouge_is_the_maximum_over_references() -> None:
    scores = rouge([["a cat slept", "the dogs run far"]], ["the dog runs"])
    # Stemmed: the, dog, run against the, dog, run, far; bigrams "the dog", "dog run": two of two and of three.
    np.testing.assert_allclose(scores, [[6 / 7, 4 / 5, 6 / 7]])
    assert rouge([["same words"]], ["same words"]).tolist() == [[1, 1, 1]]
    assert rouge([["a"]], [""]).tolist() == [[0, 0, 0]]


def test_summarization_scores(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def told(model: TextModel, prompts: list, count: int, *, stop: tuple, progress: bool) -> list[str]:
        seen.extend(bytes(prompt.astype(np.uint8)).decode() for prompt in prompts)
        assert stop == ("\n",)
        return [" a cat slept", " nothing"]

    monkeypatch.setattr(summaries, "complete", told)
    records = [{"source": ["A cat."], "target": ["cat slept", "a cat slept"]},
               {"source": ["Dogs run.", "They run far away."], "target": ["dogs run"]}]  # fmt: skip
    result = summarization.summarization(model, records)
    assert seen[0] == f"\0A cat.{CUE}"
    # 20 positions for the answer; the text is truncated at its end.
    assert seen[1] == "\0Dogs run. They run far away."[: 60 - 20 - len(CUE)] + CUE
    assert result.metrics["rouge1"].value == pytest.approx(0.5)
    assert result.baselines["rouge1_of_the_first_sentence"] == pytest.approx((0.8 + 1) / 2)
    assert result.details["new_tokens"] == 20


def test_the_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(DataError, match=r"pip install rouge-score"):
        rouge([["a"]], ["a"])
