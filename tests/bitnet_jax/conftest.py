"""Counts compilations during a test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest

COMPILED: list[str] = []  # not every supported version of jax can remove a listener: one for all tests


def _listen(event: str, duration: float, **details: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(str(details.get("fun_name", event)))


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A list that grows by one entry for each program that XLA compiles."""
    COMPILED.clear()
    yield COMPILED
    COMPILED.clear()
