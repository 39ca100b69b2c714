"""Every check that needs a GPU, one after another, within twelve minutes: kernels, training, a whole model.

    make gpu-checks                                  on a machine with an NVIDIA GPU
    python -m experiments.gpu_checks --out DIR       in an environment with jax for CUDA
    python -m experiments.gpu_checks --dry-run       only the commands

Each check writes its own file in DIR, and summary.json says which passed and how long they took. A check that fails or
exceeds its time does not stop those after it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


class Check(NamedTuple):
    what: str
    command: str  # {out} is the folder of results
    seconds: int  # limit


CHECKS = (
    Check("kernels are exact; against copies and XLA",
          "python -m bitnet_kernels.bench --device gpu --json {out}/gpu.json", 300),
    Check("odd shapes, scale groups, jit, vmap, scan and grad",
          "python -m pytest -q tests/kernels/test_on_device.py", 120),
    Check("training with int8 products against bfloat16",
          "python -m experiments.training_cost --preset 125m --json {out}/training.json", 120),
    Check("training attention against cuDNN's", "python -m experiments.gpu_attention --json {out}/attention.json", 60),
    Check("a whole model",
          "python -m bitnet_jax.cli bench --preset 2b4t --recipe bitnet_b158 --json {out}/model.json", 120),
)  # fmt: skip


def run(check: Check, out: Path) -> dict[str, Any]:
    """The outcome of a check: passed, seconds, and the end of its output if it failed."""
    command = shlex.split(check.command.format(out=out))
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command[1:]], capture_output=True, text=True, timeout=check.seconds
        )
        passed, said = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        passed, said = False, f"not finished after {check.seconds} s"
    row = {**check._asdict(), "passed": passed, "took_seconds": round(time.monotonic() - began, 1)}
    return row if passed else row | {"message": said[-2000:]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_checks"), help="folder of results")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args()
    if options.dry_run:
        print("\n".join(check.command.format(out=options.out) for check in CHECKS))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for check in CHECKS:
        rows.append(run(check, options.out))
        (options.out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(
            f"{'passed' if rows[-1]['passed'] else 'FAILED'} in {rows[-1]['took_seconds']} s: {check.what}",
            flush=True,
        )
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
