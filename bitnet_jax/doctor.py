"""What this machine can run, checked bit for bit: every implementation and instruction set.

    bitnet-jax doctor

The reference and every compiled kernel are held to plain NumPy (kernel_checks.py), and a tiny packed model, under
each instruction set, to the latent model it was packed from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import bitnet_jax
from bitnet_jax import packing
from bitnet_jax.inference.generate import greedy
from bitnet_jax.kernel_checks import Check, check_kernels, checked, instruction_set
from bitnet_jax.models import PRESETS, ModelConfig, Transformer
from bitnet_kernels import Choice, PackedArray, choose_implementation, cpu, pack
from bitnet_kernels.machine import commit, processor

RULES = (("layers_*/mlp/*", "bitnet"), ("*", "bitnet_b158"))
INSTRUCTION_SETS = (
    "scalar",
    "avx2",
    "avxvnni",
    "avx512vnni",
    "avx512vbmi",
    "avx512lookup",
    "amx",
    "neon",
    "i8mm",
)
TOKENS = 16  # greedy tokens of each of the two prompts


def diagnose() -> list[Check]:
    """All checks on this machine, in order. Never raises for a finding; a finding is a Check."""
    return [*check_kernels(), *_check_models(), *_absent()]


def healthy(checks: list[Check]) -> bool:
    return all(check.passed is not False for check in checks)


def chosen(config: ModelConfig, variables: Mapping[str, Any]) -> list[Choice]:
    """What the packed layers of a model run on here: the different choices, those of most matrices first."""
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
    """Versions and hardware, for the head of a report."""
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
    """Those of this machine, slowest first; one of them in BITNET_KERNELS_ISA is an order."""
    return cpu.available_isas()


def choice_here() -> Choice:
    """What packed_matmul takes for an ordinary matrix on this machine."""
    return choose_implementation(
        pack(jnp.ones((16, 64), jnp.int8), jnp.ones((1, 1), jnp.float32), "ternary2")
    )


def _check_models() -> list[Check]:
    """A tiny model of binary and ternary layers, packed against latent, under every instruction set."""
    config = dataclasses.replace(PRESETS["tiny"], num_layers=1, precision=RULES)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, config.vocab_size, jnp.int32)
    latent = jax.jit(Transformer(config).init)(jax.random.key(0), tokens)

    def prove(new_tokens: int) -> str:
        packed = packing.pack(latent["params"], config)
        proof = packing.prove(config, latent, packed, tokens, greedy=greedy, new_tokens=new_tokens)
        written = f", {proof.tokens_identical} greedy tokens" if new_tokens else ""
        return f"packed equals latent: {proof.matrices} matrices, {proof.logits} logits{written}"

    in_use = cpu.isa() if cpu.available_isas() else None
    checks = []
    for isa in cpu.available_isas() or (None,):
        # Generating compiles for seconds, so only what would be used here writes text as well.
        new_tokens = TOKENS if isa == in_use else 0
        with _forced(isa):
            label = f"tiny model, cpu ({isa})" if isa else "tiny model, reference"
            checks.append(checked(label, functools.partial(prove, new_tokens)))
    return checks


@contextlib.contextmanager
def _forced(isa: str | None) -> Iterator[None]:
    """Everything traced inside uses one instruction set, whatever is compiled before or after."""
    with instruction_set(isa):
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()


def _absent() -> list[Check]:
    if reason := cpu.unavailable():
        return [Check("cpu", None, reason)]
    lacking = [isa for isa in INSTRUCTION_SETS if isa not in cpu.available_isas()]
    return [Check(f"cpu ({isa})", None, "this processor does not have it") for isa in lacking] + [
        Check(platform, None, "no kernel of its own yet: XLA unpacks and multiplies")
        for platform in ("gpu", "tpu")
    ]
