"""Probes: clocks that go backwards, two processes on one folder, and a single core.

    python -m tests.robustness.processes --json outcomes.json

Every probe raises an AssertionError that describes the fault, or returns its observations.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.packed.storage import load_packed
from bitnet_jax.training.metrics import read_metrics
from tests.robustness.commands import end, environment, one_line_error, run, start, training, weights

# The clock goes back an hour at every tenth reading.
BACKWARDS = """
import asyncio, concurrent.futures, itertools, queue, threading, time  # their waits take the clock from `time` now
def backwards(real, unit):
    looks = itertools.count()
    return lambda: real() - 3600 * unit * (next(looks) // 10)
for name in {names!r}:
    setattr(time, name, backwards(getattr(time, name), 10**9 if name.endswith("_ns") else 1))
"""
WALL = ("time", "time_ns")
CLOCKS = {
    "wall clock": WALL,
    "all clocks": (*WALL, "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"),
}

# Stops before its n-th import, file opening or rename, as if the process were not scheduled.
STOPS = """
import os, signal, sys
seen = 0
def event(name, arguments):
    global seen
    if name in ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree") and {word!r} in str(arguments[0]):
        seen += 1
        if seen == {n}:
            os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(event)
"""


def stopped(process: subprocess.Popen[str]) -> bool:
    """Waits until a process has stopped or ended; returns whether it stopped."""
    for _ in range(6000):
        if process.poll() is not None:
            return False
        if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.05)
    raise AssertionError("the process neither stops nor ends")


def clocks(place: Path) -> dict[str, Any]:
    """A training and its resumption while clocks go backwards."""
    env, found = environment(place), {}
    run(training(place, "clock-whole"), env)
    for name, names in CLOCKS.items():
        prelude, workdir = BACKWARDS.format(names=names), f"clock-{name.partition(' ')[0]}"
        run(training(place, workdir, training__steps=6), env, prelude=prelude)
        run(training(place, workdir, training__steps=12), env, prelude=prelude)
        rows = list(read_metrics(place / workdir / "metrics.jsonl"))
        speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]
        assert speeds, name
        assert min(speeds) > 0, f"{name}: a speed of {min(speeds)} tokens/s"
        result = json.loads((place / workdir / "result.json").read_text())
        assert result["seconds"] >= 0, f"{name}: {result['seconds']} seconds"
        assert min(result["record"]["seconds"].values()) >= 0, f"{name}: {result['record']['seconds']}"
        assert result["status"] == "finished"
        assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))
        found[name] = "finished and went on"
    return found


def two_trainings(place: Path) -> dict[str, Any]:
    """The second is rejected with one line at every moment; the first ends as if it had been alone."""
    env = environment(place)
    run(training(place, "alone"), env)
    expected, found = weights(place / "alone"), []
    for word, n in (("config.json", 1), ("metrics.jsonl", 1), ("checkpoints", 8), ("result.json", 1)):
        workdir = f"two-{word}"
        first = start(training(place, workdir), env, prelude=STOPS.format(word=f"{workdir}/{word}", n=n))
        assert stopped(first), f"{word}: not stopped: {end(first)}"
        code, _, error = end(start(training(place, workdir), env))
        first.send_signal(signal.SIGCONT)
        assert end(first)[0] == 0
        assert one_line_error(code, error), f"{word}: exit {code}: {error}"
        assert "another process is training in it" in error
        assert weights(place / workdir) == expected
        found.append(word)
    return {"stopped at": found, "second": "refused in one line", "first": "unharmed"}


def generate_meanwhile(place: Path) -> dict[str, Any]:
    """Reads a run that is being trained: text from a complete checkpoint, or a one-line error."""
    env, found = environment(place), {}
    for word, n in (
        ("config.json", 1),
        *(("checkpoints", n) for n in (1, 4, 12, 24, 40, 60)),
        ("result.json", 1),
    ):
        workdir = f"read-{word}-{n}"
        trains = start(training(place, workdir), env, prelude=STOPS.format(word=f"{workdir}/{word}", n=n))
        was_stopped = stopped(trains)
        reads = ["generate", str(place / workdir), "--prompt", "A ", "--tokens", "4"]
        code, _, error = end(start(reads, env))
        if was_stopped:
            trains.send_signal(signal.SIGCONT)
        ended = end(trains)
        assert ended[0] == 0, ended
        assert code == 0 or one_line_error(code, error), f"{word} {n}: exit {code}: {error}"
        found[f"{word} {n}"] = "text" if code == 0 else error.replace(str(place), "PLACE").strip()
    return found


def two_packings(place: Path) -> dict[str, Any]:
    """Two packs to one folder: without --overwrite the later one is rejected; with it, one complete model remains."""
    env, found = environment(place), {}
    run(training(place, "to-pack"), env)
    for overwrite in (False, True):
        for moment, (word, n) in enumerate(((".model.", 1), (".model.", 2), (".model.", 4), (".model.", 6))):
            folder = place / f"two-packs-{overwrite}-{moment}" / "model"
            folder.parent.mkdir()
            pack = ["pack", str(place / "to-pack"), str(folder), "--tokens", "16"]
            if overwrite:
                run(pack, env)
                pack = [*pack, "--overwrite"]
            first = start(pack, env, prelude=STOPS.format(word=word, n=n))
            was_stopped = stopped(first)
            second = end(start(pack, env))
            inode = folder.stat().st_ino
            if was_stopped:
                first.send_signal(signal.SIGCONT)
            ends = [end(first), second]
            assert any(code == 0 for code, _, _ in ends), ends
            for code, _, error in ends:
                assert code == 0 or one_line_error(code, error), (code, error)
            if not overwrite:
                assert sorted(code for code, _, _ in ends) == [0, 2], [code for code, _, _ in ends]
                assert folder.stat().st_ino == inode, "the model that was there first was replaced"
            load_packed(folder, verify=True)
            left = [entry.name for entry in folder.parent.iterdir()]
            assert left == ["model"], left
            found[f"overwrite {overwrite}, stopped at {n}"] = [code for code, _, _ in ends]
    return found


STUDY = """
QUESTION = SOURCE = "none"
PAPER_EFFECT = "none"
SOURCE_TASK = TASK = "language modelling"
CLAIMS = ()
CONFIG = {config!r}
METRIC = "valid_loss"
BASELINE, EFFECT = "float32", "ternary"
ARMS = {{"float32": {{"model.precision": "float32"}}, "ternary": {{"model.precision": "bitnet_b158"}}}}
SEEDS = (0, 1)
SMALL = {{}}
"""
CONFIG = """
from ml_collections import ConfigDict
def get_config(variant="base"):
    return ConfigDict({fields!r})
"""


def two_sweeps(place: Path) -> dict[str, Any]:
    """Two sweeps share the runs: each is done once and has one row."""
    env = environment(place)
    run(training(place, "swept"), env)
    folder = place / "studies" / "toy"
    folder.mkdir(parents=True)
    fields = json.loads((place / "swept" / "config.json").read_text())
    (place / "swept.py").write_text(CONFIG.format(fields=fields))
    (folder / "study.py").write_text(STUDY.format(config=str(place / "swept.py")))
    sweep = ["sweep", str(folder), "--workdir", str(place / "work")]
    both = [start(sweep, env) for _ in range(2)]
    ends = [end(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], ends
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    names = sorted(row["run"] for row in rows)
    assert names == ["float32-seed0", "float32-seed1", "ternary-seed0", "ternary-seed1"], names
    assert {row["status"] for row in rows} == {"finished"}, rows
    shares = [error.count(": finished") for _, _, error in ends]
    assert sum(shares) == len(rows), shares
    return {"runs": len(rows), "done by each": shares}


def one_core(place: Path) -> dict[str, Any]:
    """`taskset -c N` for every kind of command."""
    env, packed = environment(place), place / "one-core-packed"
    before = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    commands = {
        "train": training(place, "one-core"),
        "pack": ["pack", str(place / "one-core"), str(packed), "--tokens", "32"],
        "generate": ["generate", str(packed), "--prompt", "A ", "--tokens", "8"],
        "eval": ["eval", str(packed), "--source", str(place / "text.txt"), "--split", "tail"],
        "bench": ["bench", "--preset", "tiny", "--prompt", "8", "--generate", "8", "--repeats", "1"],
        "doctor": ["doctor"],
    }
    seconds = {}
    for name, arguments in commands.items():
        began = time.monotonic()
        run(arguments, env, before=before)
        seconds[name] = round(time.monotonic() - began, 1)
    run(training(place, "all-cores"), env)
    assert weights(place / "one-core") == weights(place / "all-cores"), "not bit-identical on one core"
    return {"seconds": seconds, "weights": "the same bits as on all cores"}


PROBES: dict[str, Callable[[Path], dict[str, Any]]] = {
    probe.__name__: probe
    for probe in (clocks, two_trainings, generate_meanwhile, two_packings, two_sweeps, one_core)
}


def outcomes(place: Path, names: Sequence[str]) -> dict[str, Any]:
    """The observations of each probe, or the fault it found."""
    found: dict[str, Any] = {"faults": []}
    for name in names:
        began = time.monotonic()
        (place / name).mkdir()
        try:
            found[name] = PROBES[name](place / name)
        except AssertionError as fault:
            found["faults"].append([name, str(fault)[-2000:]])
        else:
            found[name] |= {"probe_seconds": round(time.monotonic() - began, 1)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES), help="default: all")
    parser.add_argument("--json", type=Path, help="write what was seen to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = outcomes(Path(place), args.probes)
    text = json.dumps(found, indent=2)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
