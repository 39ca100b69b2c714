"""Kills `pack` with SIGKILL at random moments and checks what it leaves behind.

    python -m tests.robustness.kill_pack --kills 30 --seed 0 --json outcomes.json

A child process repeatedly packs a tiny run into one folder. After each kill the folder must be absent, or a
complete model of the run; finally one more pack must succeed and leave no other files.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.packed.storage import load_packed
from bitnet_jax.tools.pack_model import pack_model
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.loop import fit

LONGEST = 0.5  # seconds between a child's first pack and its kill


def make_run(place: Path) -> Path:
    (place / "text.txt").write_text("A tiny text about quantized numbers. " * 20)
    config = {
        "model": dict(hidden_size=16, ffn_size=32, num_layers=1, num_heads=2, max_length=32),
        "data": dict(
            source=str(place / "text.txt"), split="tail", valid_fraction=0.2, length=16, batch_size=2
        ),
        "training": dict(steps=1),
        "evaluation": dict(batches=1, batch_size=2),
    }
    fit(RunConfig.from_dict(config), place / "run", progress=False)
    return place / "run"


def pack_for_ever(run: Path, folder: Path) -> None:
    while True:
        pack_model(run, folder, tokens=0, overwrite=True)
        print("packed", flush=True)


def kill_often(kills: int, seed: int, place: Path) -> dict[str, Any]:
    """Counts of what kills left behind, hidden folders included. Raises StorageError for an incomplete model."""
    random, counts = np.random.default_rng(seed), collections.Counter[str]()
    run, folder = make_run(place), place / "packed" / "model"
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.robustness.kill_pack", "--child", str(run), str(folder)],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"packed\n", "a pack after a kill failed"
            time.sleep(random.uniform(0, LONGEST))
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        litter = [entry for entry in folder.parent.iterdir() if entry.name != folder.name]
        if folder.exists():
            load_packed(folder, verify=True)
        counts["whole" if folder.exists() else "absent"] += 1
        counts["with a hidden sibling"] += bool(litter)
    pack_model(run, folder, tokens=0, overwrite=True)
    load_packed(folder, verify=True)
    left = sorted(entry.name for entry in folder.parent.iterdir())
    return {"kills": kills, "seed": seed, "outcomes": dict(counts), "left_after_the_next_pack": left}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("RUN", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        pack_for_ever(*args.child)
    with tempfile.TemporaryDirectory() as place:
        found = kill_often(args.kills, args.seed, Path(place))
    text = json.dumps(found, indent=2)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if found["left_after_the_next_pack"] == ["model"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
