"""Memory and time to the first update of training on a large text: first start (tokenizing) and restart.

    python -m experiments.data_at_size --megabytes 1000 --json data.json
    python -m experiments.data_at_size --megabytes 50 --tokenizer bpe            # train a BPE on a sample first

Writes a text of random words, as JSON lines in eight files, to a temporary folder, and trains a tiny model for a few
updates through `bitnet-jax train` in a separate process, twice, with one cache: the second start finds the tokens.
Memory is the largest resident set of the process (wait4), which includes pages of mapped files. The first update is
done when its row is in metrics.jsonl; until then, seconds since the start of the process and processor seconds of all
its threads are counted. On a machine with other work only the latter say something.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: `python experiments/data_at_size.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from bitnet_experiments.provenance import provenance
from bitnet_jax.data import Document
from bitnet_jax.data.bpe import train_bpe

FILES, WORDS, VOCABULARY = 8, 50_000, 2048
SAMPLE_MEGABYTES = 4  # of the text that a BPE is trained on
STEPS = 3
CONFIG = f"""
from ml_collections import ConfigDict

def get_config(variant=None):
    return ConfigDict(dict(
        model=dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=64, precision="bitnet_b158"),
        data=dict(source="text", root=".", tokenizer="TOKENIZER", length=128, batch_size=8, sampling="SAMPLING"),
        training=dict(steps={STEPS}, eval_every={STEPS}, checkpoint_every=1),  # a checkpoint writes the row before it
        evaluation=dict(batches=4),
    ))
"""


def words(seed: int) -> np.ndarray:
    """The vocabulary: words of 2 to 11 letters, common ones first."""
    random = np.random.default_rng(seed)
    letters = np.array([*"abcdefghijklmnopqrstuvwxyz"])
    return np.array(["".join(random.choice(letters, size)) for size in random.integers(2, 12, WORDS)])


def documents(megabytes: float, seed: int) -> Any:
    """Texts of about 5 kB, with words by Zipf's law, until they amount to this size."""
    random, vocabulary, size = np.random.default_rng(seed), words(0), 0
    while size < megabytes * 1e6:
        chosen = np.minimum(random.zipf(1.3, 900), WORDS) - 1
        text = " ".join(vocabulary[chosen])
        size += len(text)
        yield text


def write_text(folder: Path, megabytes: float) -> int:
    """JSON lines; returns the bytes of text."""
    folder.mkdir()
    size = 0
    for number in range(FILES):
        with (folder / f"{number}.jsonl").open("w") as file:
            for text in documents(megabytes / FILES, seed=number):
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text)
    return size


def start(folder: Path, run: str) -> dict[str, float]:
    """Trains in a new process; its peak of resident memory, and how long it took to its first update."""
    command = [
        sys.executable,
        "-m",
        "bitnet_jax.cli",
        "train",
        "--config",
        "config.py",
        "--workdir",
        run,
        "--quiet",
    ]
    environment = os.environ | {"BITNET_JAX_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    began, first, load = time.monotonic(), None, os.getloadavg()[0]
    with (folder / f"{run}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            metrics = folder / run / "metrics.jsonl"
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.monotonic() - began, processor_seconds(process.pid)
            if done:
                break
            time.sleep(0.01)
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen did not wait itself
    if status or first is None:
        raise RuntimeError((folder / f"{run}.log").read_text()[-2000:])
    return {
        "seconds_to_first_update": first[0],
        "processor_seconds_to_first_update": first[1],
        "peak_resident_bytes": usage.ru_maxrss * 1024,
        "load_average_before": load,
    }


def processor_seconds(process: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(megabytes: float, tokenizer: str, sampling: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="data_at_size-") as temporary:
        folder = Path(temporary)
        text_bytes = write_text(folder / "text", megabytes)
        if tokenizer == "bpe":
            sample = (Document("", text) for text in documents(SAMPLE_MEGABYTES, seed=0))
            (folder / "tokenizer.json").write_text(train_bpe(sample, VOCABULARY).to_json())
        name = "tokenizer.json" if tokenizer == "bpe" else tokenizer
        (folder / "config.py").write_text(CONFIG.replace("TOKENIZER", name).replace("SAMPLING", sampling))
        row = {
            "tokenizer": tokenizer,
            "sampling": sampling,
            "text_bytes": text_bytes,
            "steps": STEPS,
            "seed": 0,
        }
        for run in ("first_start", "restart"):
            row[run] = start(folder, run)
            print(f"{tokenizer} {sampling} {run}: {row[run]}", file=sys.stderr, flush=True)
        row["cache_bytes"] = sum(f.stat().st_size for f in (folder / "cache").glob("*.entry/*"))
        return row | provenance()


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the README."""
    lines = [
        "| tokenizer | text | start | largest resident set | processor seconds to the first update | seconds | load |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        for start in ("first_start", "restart"):
            found = row[start]
            lines.append(
                f"| {row['tokenizer']} | {row['text_bytes'] / 1e6:,.0f} MB | {start.replace('_', ' ')} | "
                f"{found['peak_resident_bytes'] / 1e6:.0f} MB | {found['processor_seconds_to_first_update']:.1f} | "
                f"{found['seconds_to_first_update']:.1f} | {found['load_average_before']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=1000.0)
    parser.add_argument("--tokenizer", choices=("byte", "bpe"), default="byte")
    parser.add_argument("--sampling", default="epoch", help="data.sampling (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="adds the row to the list in F")
    args = parser.parse_args()
    row = measure(args.megabytes, args.tokenizer, args.sampling)
    print(json.dumps(row, indent=2))
    if args.json is not None:
        rows = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps([*rows, row], indent=2) + "\n")


if __name__ == "__main__":
    main()
