"""Provenance of measurements."""

from __future__ import annotations

from typing import Any

import jax

from bitnet_jax.tools.machine import machine


def provenance() -> dict[str, Any]:
    """Commit, hardware and versions, for a row of results."""
    here = machine()
    devices = jax.devices() if here["platform"] != "cpu" else []
    accelerators = f"{len(devices)} x {devices[0].device_kind}, " if devices else ""
    return {
        "commit": here["commit"],
        "hardware": f"{accelerators}{here['cores']} cores of {here['processor']}",
        "python": here["python"],
        "jax": here["jax"],
    }
