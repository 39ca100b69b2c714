"""This machine: versions, hardware, and the kernel chosen for a matrix or a model."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import bitnet_jax
from bitnet_jax.models import ModelConfig
from bitnet_kernels import Choice, PackedArray, choose_implementation, cpu, pack
from bitnet_kernels.machine import commit, processor
from bitnet_kernels.processors import threads


def chosen(config: ModelConfig, variables: Mapping[str, Any]) -> list[Choice]:
    """The kernels that the packed layers of a model run on here, without duplicates, most frequent first."""
    counts: dict[Choice, int] = {}
    for path, precision in config.precisions().items():
        weight: Any = variables.get("packed", {})
        for name in (*path.split("/"), "weight"):
            weight = weight.get(name, {})
        if not isinstance(weight, PackedArray):
            continue
        if precision.activation == "none":
            choice = Choice("reference", None, "float activations times unpacked codes, by XLA")
        else:
            choice = choose_implementation(weight)
        counts[choice] = counts.get(choice, 0) + 1
    return sorted(counts, key=lambda choice: -counts[choice])


def machine() -> dict[str, Any]:
    """Versions and hardware, for the header of a report."""
    return {
        "bitnet_jax": bitnet_jax.__version__,
        "commit": commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": jax.default_backend(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def available_instruction_sets() -> tuple[str, ...]:
    """The instruction sets of this machine, slowest first; BITNET_KERNELS_ISA selects one of them."""
    return cpu.available_isas()


def kernel_threads() -> int:
    """The number of threads of the kernels."""
    return threads()


def local_choice() -> Choice:
    """The kernel that packed_matmul uses for a typical matrix on this machine."""
    return choose_implementation(
        pack(jnp.ones((16, 64), jnp.int8), jnp.ones((1, 1), jnp.float32), "ternary2")
    )
