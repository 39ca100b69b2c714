"""The engine: an answer is that of `generate`, to the bit, whatever else runs; prefixes, turns, cancellation."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from bitnet_jax.data.tokenizers import CharTokenizer
from bitnet_jax.inference.generation import generate
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.requests import Closed, Finished, Piece, PromptScores, QueueFull, Request
from tests.bitnet_jax.serving.tiny_models import (
    CHUNK,
    TOKENIZER,
    answers,
    end,
    engine,
    model,
    request,
    text,
    timeless,
)


def mixed_requests() -> list[Request]:
    """Greedy and sampled, short and long prompts, with scores, penalties, biases and a stop string."""
    rng = np.random.default_rng(0)
    sampled = SamplingConfig(temperature=0.9, top_p=0.8)
    prompts = [rng.integers(1, 256, size, np.uint8).tobytes() for size in (1, 16, 33, 90, 5, 70, 48)]
    return [
        request(b"scored, then continued by one token", 1, scores=True, score_prompt=True),
        request(b"penalized", 20, sampling=dataclasses.replace(sampled, repetition_penalty=1.3),
                presence_penalty=0.5, frequency_penalty=0.3, seed=2**40),
        request(b"biased", 12, bias=((65, 30.0), (66, 30.0)), stop=("AAAA",), frequency_penalty=2.0),
        *(
            request(prompt, new, sampling=sampled if i % 3 else SamplingConfig(), seed=i, scores=i % 2 == 0)
            for i, (prompt, new) in enumerate(zip(prompts, (30, 20, 3, 12, 25, 7, 9), strict=True))
        ),
    ]  # fmt: skip


@pytest.mark.optimized
@pytest.mark.extended(after=1)
@pytest.mark.parametrize("precision", ["bitnet_b158", "float32"])
def test_an_answer_does_not_depend_on_what_else_runs(precision: str) -> None:
    requests, config_variables = mixed_requests(), model(precision)
    together = engine(precision)
    assert together.exact == (precision != "float32")
    events = answers(together, *requests)
    again = answers(together, *requests[::-1])[::-1]  # in other slots, with full caches
    assert sum(end(e).cached_tokens for e in again) > 0
    for wanted, first, second in zip(requests, events, again, strict=True):
        (alone,) = answers(engine(precision), wanted)
        assert timeless(first) == timeless(alone) == timeless(second)
        if wanted.seed in (3, 4):  # greedy, and sampled
            tokens, _, _ = generate(
                *config_variables,
                wanted.prompt[None],
                max_new_tokens=wanted.max_tokens,
                sampling=wanted.sampling,
                key=jax.random.key(wanted.seed),
            )
            assert text(alone) == TOKENIZER.decode(np.asarray(tokens)[0])


def test_scores_are_those_of_the_whole_text() -> None:
    prompt = b"a prompt of three chunks, whose tokens are scored"
    (events,) = answers(engine(kv_format="float32"), request(prompt, 0, score_prompt=True))
    scores, finished = events
    assert isinstance(scores, PromptScores)
    assert isinstance(finished, Finished)
    assert finished[:3] == ("length", len(prompt), 0)
    config, variables = model("bitnet_b158")
    tokens = np.frombuffer(prompt, np.uint8).astype(np.int32)[None]
    logits = jax.jit(config.module().apply)(variables, tokens).logits[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert [score.token for score in scores.scores] == list(prompt)
    assert scores.scores[0] == (prompt[0], None, ())
    for i, score in enumerate(scores.scores[1:]):
        # Attention over a cache sums in another order.
        assert score.log_probability == pytest.approx(expected[i, prompt[i + 1]], abs=1e-4)
        assert dict(score.top)[score.top[0][0]] == max(dict(score.top).values())
        assert len(score.top) == 20


def test_a_turn_continues_the_cache_of_the_last_one_and_a_busy_slot_lends_its_prefix() -> None:
    serving = engine(slots=2)
    first = b"a system prompt that is longer than a chunk. Hello."
    (events,) = answers(serving, request(first, 8))
    longer = first + text(events).encode(errors="replace")[:2] + b" And then?"
    (events,) = answers(serving, request(longer, 8))
    assert end(events).cached_tokens >= len(first)
    # Two at once: one continues in place, the other a copy.
    both = answers(serving, request(longer + b"x", 8), request(longer + b"y", 8))
    assert min(end(e).cached_tokens for e in both) >= len(longer)
    for suffix, cached in zip((b"x", b"y"), both, strict=True):
        (alone,) = answers(engine(slots=2), request(longer + suffix, 8))
        assert timeless(alone) == timeless(cached)
    assert serving.counters.prefix_hits == 3
    assert (
        end(answers(serving, request(longer, 0, score_prompt=True))[0]).cached_tokens == 0
    )  # all must be read


def test_what_prompts_share_is_read_once_even_when_they_come_together() -> None:
    shared = b"a system prompt of several chunks, which four requests share. "
    serving = engine(slots=4)
    requests = [request(shared + suffix, 5) for suffix in (b"1", b"2", b"1", b"")]
    events = answers(serving, *requests)
    for wanted, got in zip(requests, events, strict=True):
        assert timeless(got) == timeless(answers(engine(slots=4), wanted)[0])
    assert [end(e).cached_tokens for e in events] == [0, len(shared), len(shared), len(shared) - 1]
    assert serving.counters.prefix_hits == 3
    # A request whose reader was cancelled goes on by itself.
    waiting: list[list[object]] = [[], []]
    other = shared[::-1]
    first, _ = (serving.submit(request(other, 3), events.append) for events in waiting)
    serving.step()
    first.cancel()
    while serving.step():
        pass
    assert timeless(waiting[1]) == timeless(answers(engine(slots=4), request(other, 3))[0])


@pytest.mark.optimized
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_prompt_lookup_changes_no_answer(temperature: float) -> None:
    bias = tuple((token, 9.0) for token in range(65, 70))  # so that the text repeats itself
    sampling = SamplingConfig(temperature=temperature)
    wanted = request(b"ABCDEABCDE" * 3, 60, sampling=sampling, bias=bias, scores=True, stop=("EEEEEE",))
    (plain,) = answers(engine(), wanted)
    with_drafts = engine(prompt_lookup=4)
    (drafted,) = answers(with_drafts, wanted)
    assert timeless(drafted) == timeless(plain)
    assert with_drafts.counters.passes < 0.9 * end(drafted).completion_tokens
    # To the end of the context, with another answer at times; then from the cache that drafts were written to.
    longest = request(b"ABCDEABCDE", 150, sampling=sampling, bias=bias)
    both = answers(with_drafts, longest, request(b"x", 9))
    (alone,) = answers(engine(), longest)
    assert timeless(both[0]) == timeless(alone)
    again = request(b"ABCDEABCDE" + text(alone).encode()[:70] + b"?", 30, bias=bias)
    assert timeless(answers(with_drafts, again)[0]) == timeless(answers(engine(), again)[0])
    with pytest.raises(ValueError, match="prompt_lookup: got 4 for a model whose sums depend"):
        engine("float32", prompt_lookup=4)


def test_a_long_prompt_delays_an_answer_by_a_chunk_a_token() -> None:
    serving, seen = engine(slots=2), []
    serving.submit(request(b"short", 8), lambda event: seen.append("short"))
    serving.step()
    assert seen == ["short"] * 2  # its prompt and one pass
    serving.submit(request(bytes(8 * CHUNK), 1), lambda event: seen.append("long"))
    for _ in range(6):
        serving.step()
    assert serving._pools[0].read_tokens(0, np.zeros(CHUNK, np.int32), 0, CHUNK, False).is_ready()
    assert seen == ["short"] * 9  # all eight tokens and the end, while the other prompt is read
    while serving.step():
        pass
    assert seen[9:] == ["long"] * 2


def test_prompts_and_clients_take_turns() -> None:
    serving, order = engine(slots=1), []
    for client, name in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1")]:
        serving.submit(
            request(name.encode(), 1, client=client),
            lambda event, name=name: order.append(name) if isinstance(event, Finished) else None,
        )
    while serving.step():
        pass
    assert order == ["a1", "b1", "a2", "a3"]


def test_cancelled_answers_end_before_the_next_pass_and_free_their_slot() -> None:
    serving = engine(slots=1)
    events: list[list[object]] = [[], [], []]
    reading = serving.submit(request(bytes(9 * CHUNK), 5), events[0].append)
    waiting = serving.submit(request(b"never begun", 5), events[1].append)
    serving.submit(request(b"unharmed", 5), events[2].append)
    serving.step()
    reading.cancel(), waiting.cancel()
    passes = serving.counters.passes
    serving.step()
    assert [e[-1].reason for e in events[:2]] == ["cancelled"] * 2  # type: ignore[attr-defined]
    assert serving.counters.passes - passes == 2  # of the third
    while serving.step():
        pass
    (alone,) = answers(engine(slots=1), request(b"unharmed", 5))
    assert timeless(events[2]) == timeless(alone)  # type: ignore[arg-type]
    assert serving.counters.cancelled == 2
    assert serving.running == serving.waiting == 0


def test_a_failed_pass_ends_the_answers_at_work_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = engine(slots=1)
    events: list[object] = []
    serving.submit(request(b"fails", 5), events.append)
    with monkeypatch.context() as patch:
        patch.setattr(serving._pools[0], "decode", lambda *_: 1 / 0)
        serving.step()
    assert events[-1].reason == "error"  # type: ignore[attr-defined]
    assert "ZeroDivisionError" in events[-1].message  # type: ignore[attr-defined]
    (after,) = answers(serving, request(b"fails", 5))
    assert end(after).reason == "length"
    assert end(after).cached_tokens == 0
    # An answer that has just left the queue is one of them.
    serving, prompt = engine(slots=2), bytes(3 * CHUNK)
    answers(serving, request(b"another"), request(prompt, 100))
    with monkeypatch.context() as patch:
        patch.setattr(serving._pools[0], "copy_row", lambda *_: 1 / 0)
        (failed,) = answers(serving, request(prompt, 5))
    assert end(failed).reason == "error"
    assert serving.running == 0


def test_an_answer_that_takes_too_long_is_given_up_and_slots_say_what_they_do() -> None:
    serving = engine(slots=2, timeout=60.0)
    idle = {"state": "idle", "tokens_in_cache": 0}
    assert serving.describe_slots() == [idle, idle]
    events: list[list[object]] = [[], [], []]
    for sink, wanted in zip(
        events, (request(b"x", 50), request(bytes(3 * CHUNK), 50), request(b"y", 50)), strict=True
    ):
        serving.submit(wanted, sink.append)
    serving.step()
    serving.step()
    states = [{k: v for k, v in slot.items() if k != "seconds"} for slot in serving.describe_slots()]
    assert states == [
        {"state": "decoding", "tokens_in_cache": 3, "generated_tokens": 3},
        {"state": "reading", "tokens_in_cache": CHUNK, "generated_tokens": 0},
    ]
    serving.timeout = 1e-9
    serving.step()
    for sink in events:  # two at work and one in the queue
        assert sink[-1].reason == "timeout"
        assert sink[-1].message == "it took longer than 1e-09 s"
    assert serving.counters.timed_out == 3
    assert (serving.running, serving.waiting) == (0, 0)
    with pytest.raises(ValueError, match="timeout: got 0, expected more than 0 seconds"):
        engine(timeout=0)


def test_a_token_that_the_tokenizer_lacks_ends_its_answer_alone() -> None:
    serving = Engine(*model("bitnet_b158"), CharTokenizer("abc"), slots=2, chunk=CHUNK)
    wanted = request(b"\0\1", 3, bias=tuple((token, 100.0) for token in range(3)))
    failed, unharmed = answers(serving, request(b"\2", 3, bias=((200, 1000.0),)), wanted)
    assert (end(failed).reason, end(unharmed).reason) == ("error", "length")
    assert "got 200, expected 0 to 2" in end(failed).message
    assert set(text(unharmed)) <= set("abc")


def test_end_tokens_stop_strings_and_the_scores_that_belong_to_the_text() -> None:
    bias = ((65, 1000.0),)
    (events,) = answers(engine(), request(b"x", 9, bias=bias, stop=("AAA",), scores=True))
    assert (text(events), end(events).reason) == ("", "stop")
    assert end(events).completion_tokens == 3
    assert [e for e in events if isinstance(e, Piece)] == []
    (events,) = answers(engine(), request(b"x", 4, bias=bias, stop=("AAB",), scores=True))
    assert (text(events), end(events).reason) == ("AAAA", "length")
    assert [s.token for e in events if isinstance(e, Piece) for s in e.scores] == [65] * 4
    (events,) = answers(engine(), request(b"x", 4, bias=bias, end=(65,), scores=True))
    assert (text(events), end(events).reason, end(events).completion_tokens) == ("", "stop", 1)
    assert [s.token for e in events if isinstance(e, Piece) for s in e.scores] == [65]


def test_requests_that_cannot_be_served() -> None:
    serving = engine(slots=1, context=40, queue_limit=2)
    for wanted, message in [
        (request(b""), "the prompt has no tokens"),
        (
            request(bytes(30), 11),
            "a prompt of 30 tokens and 11 new ones need 41 positions, expected at most 40",
        ),
        (Request(prompt=np.array([1, 256]), max_tokens=1), "got 256, expected 0 to 255"),
        (request(b"x", bias=((256, 1.0),)), "bias: got the token 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            serving.submit(wanted, print)
    for _ in range(2):
        serving.submit(request(b"x"), lambda event: None)
    with pytest.raises(QueueFull, match="2 requests wait"):
        serving.submit(request(b"x"), print)
    serving.close()
    with pytest.raises(Closed):
        serving.submit(request(b"x"), print)
    serving.run()  # returns, since all were cancelled
    assert (serving.counters.requests, serving.counters.refused, serving.counters.cancelled) == (2, 1, 2)
    with pytest.raises(ValueError, match="context: got 161, expected 2 to 160"):
        engine(context=161)


def test_a_warm_engine_compiles_nothing_for_ordinary_requests(compilations: list[str]) -> None:
    serving = engine(slots=4, context=100)
    serving.warm().join()
    compilations.clear()
    sampled = SamplingConfig(temperature=1.0)
    answers(
        serving,
        request(b"a prompt of several chunks, the last one short", 4),
        request(b"x", 4, sampling=sampled),
    )
    assert compilations == []
