"""Vectors of texts over HTTP: the model, one request at a time, and the bodies of /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import threading
from typing import Any

import numpy as np

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.inference.steps import Variables
from bitnet_jax.inference.text_vectors import embed, encoder_ids
from bitnet_jax.models import ModelConfig
from bitnet_jax.serving.fields import ApiError, Fields
from bitnet_jax.serving.requests import Closed, QueueFull
from bitnet_jax.serving.schemas import Served, token_ids

BATCH = 8  # texts of a pass, always, so that a vector does not depend on the other texts of a request
MOST_INPUTS = 2048  # of a request


class Encoder:
    """A sentence encoder. Requests take turns, in the event loop; their passes run in another thread.

    Args:
      queue_limit: requests that may wait.

    Raises:
      ValueError: a model without `pooling`.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: Variables,
        tokenizer: Tokenizer,
        conversation: Conversation,
        *,
        queue_limit: int = 256,
    ) -> None:
        if config.pooling == "none":
            raise ValueError("got a model without pooling, expected a sentence encoder")
        self.config, self.context = config, config.known_length
        self._variables, self._tokenizer, self._conversation = variables, tokenizer, conversation
        self._turn, self._asking, self._queue_limit = asyncio.Lock(), 0, queue_limit
        self._closed = threading.Event()

    def warm(self) -> None:
        """Compiles and runs the pass of a short text."""
        ids = np.array([*self._conversation.begin, *self._conversation.end] or [0], np.int32)
        embed(self.config, self._variables, [ids], BATCH)

    def run(self) -> None:
        """Returns after `close`."""
        self._closed.wait()

    def close(self) -> None:
        """Refuses further requests."""
        self._closed.set()

    def tokens(self, texts: list[str]) -> list[np.ndarray]:
        """int32 [T] of each text, with begin and end tokens. Raises ValueError: a text is too long."""
        ids, cut = encoder_ids(self._tokenizer, self._conversation, texts, self.context)
        if cut:
            raise ValueError(
                f"input[{cut[0]}]: got a text of more than {self.context} tokens, expected a shorter one"
            )
        return ids

    async def vectors(self, ids: list[np.ndarray]) -> np.ndarray:
        """Unit vectors, float32 [N, D]. If it is cancelled, its work ends with the batch that is being computed.

        Raises:
          ValueError: see `embed`.
          QueueFull, Closed: see there.
        """
        if self._asking > self._queue_limit:
            raise QueueFull(f"{self._queue_limit} requests wait; try again later")
        cancelled = threading.Event()

        def go_on() -> None:
            if cancelled.is_set():
                raise InterruptedError

        self._asking += 1
        try:
            async with self._turn:
                if self._closed.is_set():
                    raise Closed("the server is shutting down")
                passes = asyncio.to_thread(embed, self.config, self._variables, ids, BATCH, before_pass=go_on)
                work = asyncio.ensure_future(passes)
                try:
                    return await asyncio.shield(work)
                except (
                    asyncio.CancelledError
                ):  # the next request begins when the batch is done, not beside it
                    cancelled.set()
                    await asyncio.wait([work])
                    work.exception()  # known
                    raise
        finally:
            self._asking -= 1


@dataclasses.dataclass(frozen=True)
class AskedVectors:
    """What a body asks for: vectors of these tokens, in this form."""

    ids: list[np.ndarray]
    form: str

    def answer(self, vectors: np.ndarray, served: Served) -> dict[str, Any]:
        shown = [
            one.tolist() if self.form == "float" else base64.b64encode(one.astype("<f4").tobytes()).decode()
            for one in vectors
        ]
        count = sum(map(len, self.ids))
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(shown)],
            "model": served.name,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }


def embeddings(fields: Fields, served: Served, encoder: Encoder) -> AskedVectors:
    """Raises ApiError, or ValueError of a text that is too long."""
    served.adapter(fields)
    ids = _inputs(fields, served, encoder)
    form, D = fields.text("encoding_format", "float"), encoder.config.hidden_size
    if form not in ("float", "base64"):
        raise fields.wrong("encoding_format", form, "float or base64")
    fields.integer("dimensions", D, D)
    fields.text("user")
    fields.done()
    return AskedVectors(ids, form)


def _inputs(fields: Fields, served: Served, encoder: Encoder) -> list[np.ndarray]:
    """Of a text, a list of texts, token ids (taken as they are), or a list of such lists."""
    given = fields.take("input")
    alone = isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int)
    listed = [given] if alone else given
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_INPUTS:
        raise fields.wrong("input", given, f"a text, token ids, or a list of 1 to {MOST_INPUTS} of either")
    if all(isinstance(one, str) for one in listed):
        if "" in listed:
            raise ApiError("input: got an empty text, expected at least one character", param="input")
        return encoder.tokens(listed)
    return [token_ids(fields, "input", one, served) for one in listed]
