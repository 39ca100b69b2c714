"""Checks annotations at run time, and counts compilations during a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import pytest

# The annotations of these packages, shapes and dtypes of arrays included, are checked in every call that their own
# tests make: a wrong one raises jaxtyping.TypeCheckError. The hook must be there before the first import of them.
# It is not passed on to child processes. As for mypy, an int is a valid float.
CHECKED = ("quantization", "nn", "models", "training")
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook([f"bitnet_jax.{package}" for package in CHECKED], CHECKER)
jaxtyping.config.update("jaxtyping_disable", True)  # outside these tests

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def checked_annotations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Checks annotations, unless the test has the mark `unchecked_annotations`."""
    if request.path.parent not in [HERE / package for package in CHECKED] or request.node.get_closest_marker(
        "unchecked_annotations"
    ):
        yield
        return
    jaxtyping.config.update("jaxtyping_disable", False)
    yield
    jaxtyping.config.update("jaxtyping_disable", True)


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
