"""Figures of the engine in the format of Prometheus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from bitnet_jax.data.errors import DataError
from bitnet_jax.optional_packages import missing_package
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.requests import Finished

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
except ImportError as error:
    raise DataError(missing_package("prometheus-client")) from error

PREFIX = "bitnet_jax"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
HELP = {
    "requests": "Requests accepted",
    "refused": "Requests refused because the queue was full",
    "cancelled": "Requests whose client left",
    "timed_out": "Requests that took too long",
    "failed": "Requests that ended in an error of the engine or of their schema",
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that were in the cache",
    "prefix_hits": "Requests that found a prefix of their prompt in the cache",
    "generated_tokens": "Tokens generated",
    "passes": "Passes through the model",
}


class Metrics:
    """The figures of a server, whose engine may not be loaded yet."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._registry = CollectorRegistry()
        self._engine = engine
        self._registry.register(self)
        names = {"first_token_seconds": "To the first token of an answer", "answer_seconds": "To its end"}
        self._first, self._whole = (
            Histogram(f"{PREFIX}_{name}", text, buckets=SECONDS, registry=self._registry)
            for name, text in names.items()
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def observe(self, event: Finished) -> None:
        """The times of an answer."""
        if event.first_seconds is not None:
            self._first.observe(event.first_seconds)
            self._whole.observe(event.seconds)

    def collect(self) -> Iterator[Any]:
        engine = self._engine()
        if engine is None:
            return
        for name, value in dataclasses.asdict(engine.counters).items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", HELP[name], value=value)
        for name, text, value in [
            ("running", "Requests in a slot", engine.running),
            ("waiting", "Requests in the queue", engine.waiting),
            ("slots", "Slots", engine.slots),
        ]:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
