"""One run of a 5M-parameter language model by one process, and the same run by two: are they the same?

    python -m experiments.several_processes --json experiments/studies/several_processes/results.json

Three runs of the same config (sequences of 128 bytes of the standard library), through `bitnet-jax train`:

    one device       one process with one device
    two devices      one process with two devices, parameters and optimizer state split over them (mesh.fsdp=2)
    two processes    two processes with one device each, likewise

Two devices add two parts of a sum, whose order does not matter; so the last two must agree to the bit. Each is done in
float32 and with ternary weights, for every seed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bitnet_experiments.provenance import provenance
from bitnet_jax.training.metrics import read_metrics

STEPS, SEEDS, PRECISIONS = 8, (2, 3, 4), ("float32", "bitnet_b158")
SETTINGS: dict[str, Any] = {
    "model": {"hidden_size": 256, "ffn_size": 768, "num_layers": 6, "num_heads": 4},
    "data": {"length": 128, "batch_size": 16},
    "training": {"steps": STEPS, "eval_every": STEPS, "checkpoint_every": STEPS},
    "evaluation": {"batches": 2},
}
CONFIG = "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({settings!r})\n"
ARMS = {"one device": (1, 1), "two devices": (1, 2), "two processes": (2, 1)}  # processes, devices of each


def run(config: Path, folder: Path, processes: int, devices: int) -> dict[str, Any]:
    """Train in `folder`; the losses of all updates, the held-out loss and the checksums of the last checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [
        sys.executable,
        "-m",
        "bitnet_jax.cli",
        "train",
        "--config",
        str(config),
        "--workdir",
        str(folder),
    ]
    command += [f"--config.mesh.fsdp={processes * devices}", "--quiet"]
    if processes > 1:
        command += ["--config.distributed.launch=manual", f"--config.distributed.processes={processes}"]
        command += [f"--config.distributed.coordinator=127.0.0.1:{port}"]
    each = [[f"--config.distributed.process={i}"] if processes > 1 else [] for i in range(processes)]
    started = [
        subprocess.Popen([*command, *more], env=environment, stdout=subprocess.DEVNULL) for more in each
    ]
    if any([process.wait() for process in started]):
        raise SystemExit(f"{folder.name}: a process failed")
    rows = list(read_metrics(folder / "metrics.jsonl"))
    meta = json.loads((folder / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    result = json.loads((folder / "result.json").read_text())
    return {
        "losses": [row["loss"] for row in rows if row["kind"] == "train"],
        "valid": [row["loss"] for row in rows if row["kind"] == "valid"],
        "checksums": meta["checksums"],
        "parameters": result["parameters"],
    }


def compare(precision: str, seed: int, folder: Path) -> dict[str, Any]:
    """The three runs of a precision and a seed, and how they differ."""
    config = folder / "config.py"
    model = SETTINGS["model"] | {"precision": precision}
    config.write_text(CONFIG.format(settings=SETTINGS | {"seed": seed, "model": model}))
    runs = {name: run(config, folder / f"{precision} {seed} {name}", *arm) for name, arm in ARMS.items()}
    one, two, processes = runs.values()
    differences = [abs(a - b) / a for a, b in zip(one["losses"], processes["losses"], strict=True)]
    return {
        "precision": precision,
        "seed": seed,
        "parameters": one["parameters"],
        "losses": {name: found["losses"] for name, found in runs.items()},
        "held_out_loss": {name: found["valid"][-1] for name, found in runs.items()},
        "two_processes_bit_identical_to_two_devices": two == processes,
        "first_loss_against_one_device": differences[0],
        "largest_loss_difference_against_one_device": max(differences),
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of the README; the last three columns are relative to one device."""
    lines = [
        "| precision | seed | two processes bit-identical to two devices | first loss | largest | held out |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for row in results["runs"]:
        held_out = row["held_out_loss"]
        same = "yes" if row["two_processes_bit_identical_to_two_devices"] else "no"
        first, largest = (
            row["first_loss_against_one_device"],
            row["largest_loss_difference_against_one_device"],
        )
        last = abs(held_out["two processes"] / held_out["one device"] - 1)
        lines.append(
            f"| {row['precision']} | {row['seed']} | {same} | {first:.1e} | {largest:.1e} | {last:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    target = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        runs = [compare(precision, seed, Path(folder)) for precision in PRECISIONS for seed in SEEDS]
    results = {"settings": SETTINGS, "steps": STEPS, **provenance(), "runs": runs}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
