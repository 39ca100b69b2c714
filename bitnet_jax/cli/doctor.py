"""Check every kernel on this machine against NumPy, and a tiny packed model against the latent one.

Exit code 0: every check passed; 1: a check failed.

example:
  bitnet-jax doctor
  BITNET_KERNELS_ISA=avx2 bitnet-jax doctor        # with one instruction set as the default
"""

from __future__ import annotations

import argparse
import dataclasses

from bitnet_jax.cli.shared import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    """This command has no arguments."""


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.tools import doctor as checks
    from bitnet_jax.tools.machine import local_choice, machine

    here, choice = machine(), local_choice()
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    found = checks.diagnose()
    words = {True: "ok", False: "WRONG", None: "absent"}
    for check in found:
        print(f"{words[check.passed]:7s} {check.name:32s} {check.detail}")
    healthy = checks.healthy(found)
    print(f"packed_matmul runs on {choice.name}: {choice.reason}")
    print(
        "healthy"
        if healthy
        else "error: something above is WRONG; do not trust packed models on this machine"
    )
    figures = {"machine": here, "choice": choice._asdict(), "healthy": healthy}
    write_json(args.json, figures | {"checks": [dataclasses.asdict(check) for check in found]})
    return 0 if healthy else 1
