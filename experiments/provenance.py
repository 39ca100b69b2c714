"""What a figure was measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from bitnet_jax.doctor import machine


def provenance() -> dict[str, Any]:
    """Commit, hardware and versions, for a row of results."""
    folder, here = Path(__file__).parent, machine()
    command = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or "unknown",
        "hardware": f"{here['cores']} cores of {here['processor']}",
        "python": here["python"],
        "jax": here["jax"],
    }
