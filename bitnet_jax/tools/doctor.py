"""Checks every implementation and instruction set of this machine.

    bitnet-jax doctor

The reference and every compiled kernel are compared with plain NumPy (kernel_checks.py), and a tiny packed model,
under each instruction set, with the latent model it was packed from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.inference.generation import greedy
from bitnet_jax.models import PRESETS, Transformer
from bitnet_jax.packed import packing
from bitnet_jax.packed.proof import compare_logits, logits, prove
from bitnet_jax.tools.kernel_checks import Check, check_kernels, checked, instruction_set
from bitnet_kernels import choose_implementation, cpu, pack, relayout
from bitnet_kernels.packed import LAYOUTS

RULES = (("layers_*/mlp/*", "bitnet"), ("*", "bitnet_b158"))
TOKENS = 16  # greedy tokens of each of the two prompts


def diagnose() -> list[Check]:
    """All checks on this machine, in order. A failure is returned as a Check, not raised."""
    return [*check_kernels(), *_check_models(), *_absent()]


def healthy(checks: list[Check]) -> bool:
    return all(check.passed is not False for check in checks)


def _check_models() -> list[Check]:
    """A tiny model of binary and ternary layers, packed against latent, under every instruction set."""
    config = dataclasses.replace(PRESETS["tiny"], num_layers=1, precision=RULES)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, config.vocab_size, jnp.int32)
    latent = jax.jit(Transformer(config).init)(jax.random.key(0), tokens)
    module = config.module()

    @functools.cache
    def packed() -> dict[str, Any]:
        return packing.pack(latent["params"], config)

    @functools.cache
    def latent_logits() -> np.ndarray:
        return np.asarray(logits(module, latent, tokens))

    def check() -> str:
        latent_logits()  # the program that the proof runs, too
        found = prove(config, latent, packed(), tokens, greedy=greedy, new_tokens=TOKENS)
        return (
            f"packed equals latent: {found.matrices} matrices, {found.logits} logits, "
            f"{found.tokens_identical} greedy tokens"
        )

    def check_logits() -> str:
        _, count = compare_logits(latent_logits(), np.asarray(logits(module, packed(), tokens)))
        return f"packed equals latent: {count} logits"

    # Compilation is most of the time. What would be used here is proved in full, with the text that it writes; codes
    # and latent logits depend on no instruction set, so the others have only their forward pass to compile.
    isas = cpu.available_isas() or (None,)
    in_use = cpu.isa() if cpu.available_isas() else None
    labels = {isa: f"tiny model, cpu ({isa})" if isa else "tiny model, reference" for isa in isas}
    with _forced(in_use):
        checks = {in_use: checked(labels[in_use], check)}
    for isa in isas:
        if isa != in_use:
            with _forced(isa):
                checks[isa] = checked(labels[isa], check_logits)
    return [checks[isa] for isa in isas]


@contextlib.contextmanager
def _forced(isa: str | None) -> Iterator[None]:
    """Everything traced inside uses this instruction set; compiled functions are not shared with the outside."""
    with instruction_set(isa):
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()


def _absent() -> list[Check]:
    """What is not checked on this machine, and why."""
    if reason := cpu.unavailable():
        lacking = [Check("cpu", None, reason)]
    else:
        isas = [isa for isa in cpu.known_isas() if isa not in cpu.available_isas()]
        lacking = [Check(f"cpu ({isa})", None, "not supported by this processor") for isa in isas]
    return lacking + [Check(platform, None, _accelerator(platform)) for platform in ("gpu", "tpu")]


def _accelerator(platform: str) -> str:
    """What packed_matmul would run on a platform, for a ternary matrix in the layout of its kernels."""
    w = pack(jnp.zeros((128, 512), jnp.int8), jnp.ones((1, 1)), "ternary2")
    layout = next(name for name, where in LAYOUTS.items() if where == platform)
    choice = choose_implementation(relayout(w, layout), platform)
    if choice.name != platform:
        return choice.reason
    here = "" if jax.default_backend() == platform else f"no {platform} here; "
    return f"{choice.reason}, not checked: {here}run pytest tests/kernels/test_on_device.py on one"
