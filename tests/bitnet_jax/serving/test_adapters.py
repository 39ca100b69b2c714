"""Adapters chosen per request: an answer is that of the model with its adapter alone, whatever else runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.cli.serve import _adapters
from bitnet_jax.inference.generation import generate
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.nn.adapter import adapter_output
from bitnet_jax.packed.adapters import Adapter, layer_shapes, padded, with_adapters
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.schemas import Served
from tests.bitnet_jax.serving.tiny_models import (
    CHUNK,
    TOKENIZER,
    answers,
    end,
    model,
    request,
    text,
    timeless,
)
from tests.bitnet_jax.serving.tiny_servers import CONVERSATION, ask, started


@functools.cache
def adapters() -> dict[str, Adapter]:
    """Of different ranks and layers."""
    config, _ = model("bitnet_b158")
    found = {}
    for name, rank, layers in (("pirate", 2, "attention"), ("lawyer", 5, "")):
        rng = np.random.default_rng(rank)
        pairs = {
            path: tuple(rng.normal(size=size).astype(jnp.bfloat16) for size in ((rank, k), (n, rank)))
            for path, (n, k) in layer_shapes(config).items()
            if layers in path
        }
        found[name] = Adapter(pairs, 0.5, "base")
    return found


def engine(slots: int = 3) -> Engine:
    config, variables = model("bitnet_b158")
    named = {name: with_adapters(variables, [(one, 1.0)]) for name, one in padded(adapters()).items()}
    return Engine(config, variables, TOKENIZER, slots=slots, chunk=CHUNK, adapters=named)


def test_an_answer_is_that_of_its_adapter_alone_whatever_else_runs() -> None:
    config, variables = model("bitnet_b158")
    prompt = b"the same prompt for all of them, longer than a chunk"
    kinds: list[str | None] = [None, "pirate", "lawyer", "pirate", None, "lawyer"]
    sampled = SamplingConfig(temperature=0.8)
    requests = [
        request(prompt, 8, adapter=kind, sampling=sampled if i % 2 else SamplingConfig(), seed=i)
        for i, kind in enumerate(kinds)
    ]
    together = answers(engine(), *requests)
    for wanted, got in zip(requests, together, strict=True):
        (alone,) = answers(engine(slots=1), wanted)
        assert timeless(got) == timeless(alone)
        own = (
            variables
            if wanted.adapter is None
            else with_adapters(variables, [(adapters()[wanted.adapter], 1.0)])
        )
        tokens, _, _ = generate(
            config,
            own,
            wanted.prompt[None],
            max_new_tokens=8,
            sampling=wanted.sampling,
            key=jax.random.key(wanted.seed),
        )
        assert text(got) == TOKENIZER.decode(np.asarray(tokens)[0])
    assert len({text(events) for events in together[:3]}) == 3  # the adapters do something


def test_a_prefix_that_another_adapter_has_read_is_not_taken() -> None:
    prompt = b"a system prompt that is longer than a chunk, and then a question"
    serving = engine(slots=2)
    ends = [
        end(answers(serving, request(prompt, 4, adapter=kind))[0])
        for kind in (None, "pirate", "pirate", None)
    ]
    assert [one.cached_tokens for one in ends] == [0, 0, len(prompt) - 1, len(prompt) - 1]


def test_all_adapters_share_their_programs() -> None:
    found = {name: with_adapters({}, [(one, 1.0)]) for name, one in padded(adapters()).items()}
    first, second = (jax.tree.map(jnp.shape, one) for one in found.values())
    assert first == second
    config, _ = model("bitnet_b158")
    for name, one in adapters().items():  # zeros change no bit
        for path, values in one.layers.items():
            x = jax.random.normal(jax.random.key(0), (3, layer_shapes(config)[path][1]))
            outputs = [
                adapter_output(x, {"a": jnp.float32(a), "b": jnp.float32(b), "scale": jnp.full(len(a), 0.5)})
                for a, b in (values, padded(adapters())[name].layers[path])
            ]
            np.testing.assert_array_equal(*outputs)


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(
        ValueError, match="adapter: got 'pirates', expected one of pirate, lawyer; did you mean"
    ):
        engine().submit(request(b"x", adapter="pirates"), print)


def test_to_clients_an_adapter_is_a_model() -> None:
    serving = engine()
    served = Served("tiny", TOKENIZER, CONVERSATION, serving.context, serving.adapters)
    server = started(lambda: (serving, served))
    body = {"prompt": "the same prompt", "temperature": 0, "max_tokens": 8}
    status, models, _ = ask(server, "/v1/models")
    assert [model["id"] for model in models["data"]] == ["tiny", "pirate", "lawyer"]
    assert ask(server, "/v1/models/lawyer")[1]["id"] == "lawyer"
    for name, kind in (("tiny", None), ("pirate", "pirate")):
        status, answer, _ = ask(server, "/v1/completions", body | {"model": name})
        (events,) = answers(engine(slots=1), request(b"the same prompt", 8, adapter=kind))
        assert (status, answer["model"], answer["choices"][0]["text"]) == (200, name, text(events))
    status, answer, _ = ask(
        server, "/v1/responses", {"model": "lawyer", "input": "hello", "max_output_tokens": 3}
    )
    assert (status, answer["model"]) == (200, "lawyer")
    status, answer, _ = ask(server, "/v1/completions", body | {"model": "judge"})
    assert status == 404
    assert "expected 'tiny' or 'pirate' or 'lawyer'" in answer["error"]["message"]
    server.stop()


def test_the_command_names_each_adapter_once() -> None:
    assert _adapters(["a=x.safetensors", "b=y=z"], "model") == {"a": "x.safetensors", "b": "y=z"}
    for given in (["a"], ["=x"], ["a="], ["a=x", "a=y"], ["model=x"]):
        with pytest.raises(ValueError, match="got --adapter"):
            _adapters(given, "model")
