"""What is compiled while a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest

COMPILED: list[
    str
] = []  # a listener cannot be taken away again in every supported version of jax: one for all


def _listen(event: str, duration: float, **details: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(str(details.get("fun_name", event)))


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one with each program that XLA compiles."""
    COMPILED.clear()
    yield COMPILED
    COMPILED.clear()
