"""Models of a few kilobytes with random weights on bytes: one whose rows are exact, one whose sums XLA orders."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.data.tokenizers import ByteTokenizer
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.requests import Event, Finished, Piece, Request

TOKENIZER = ByteTokenizer()
CHUNK = 16


@functools.cache
def model(precision: str, vocab_size: int = 256) -> tuple[ModelConfig, dict[str, Any]]:
    packed = precision != "float32"
    config = ModelConfig(
        vocab_size=vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=64, max_length=160,
        init_std=0.5, tie_embeddings=True, precision=precision, embedding_dtype="bfloat16" if packed else "float32",
    )  # fmt: skip
    variables = jax.jit(Transformer(config).init)(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))
    return config, packing.pack(variables["params"], config) if packed else variables


def engine(precision: str = "bitnet_b158", slots: int = 3, **options: Any) -> Engine:
    return Engine(*model(precision), TOKENIZER, slots=slots, chunk=CHUNK, **options)


def request(prompt: bytes, max_tokens: int = 6, **fields: Any) -> Request:
    return Request(prompt=np.frombuffer(prompt, np.uint8).astype(np.int32), max_tokens=max_tokens, **fields)


def answers(engine: Engine, *requests: Request) -> list[list[Event]]:
    """The events of requests that are asked together."""
    events: list[list[Event]] = [[] for _ in requests]
    for wanted, sink in zip(requests, events, strict=True):
        engine.submit(wanted, sink.append)
    while engine.step():
        pass
    return events


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def end(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def timeless(events: list[Event]) -> list[Event]:
    """Events without the times and the cache hits of the last one."""
    timed: dict[str, Any] = {"cached_tokens": 0, "first_seconds": None, "seconds": 0}
    return [event._replace(**timed) if isinstance(event, Finished) else event for event in events]
