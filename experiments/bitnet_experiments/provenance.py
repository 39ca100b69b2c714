"""Provenance of measurements."""

from __future__ import annotations

from typing import Any

from bitnet_jax.tools.machine import machine


def provenance() -> dict[str, Any]:
    """Commit, hardware and versions, for a row of results."""
    here = machine()
    return {
        "commit": here["commit"],
        "hardware": f"{here['cores']} cores of {here['processor']}",
        "python": here["python"],
        "jax": here["jax"],
    }
