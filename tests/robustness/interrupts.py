"""Ctrl-C at many moments of `bitnet-jax train`, `pack`, `generate` and `eval`.

    python -m tests.robustness.interrupts --moments 10 --json outcomes.json

A command must exit with 130 and no traceback, or finish; its output is complete or absent, and a training that
is resumed is bit-identical to an uninterrupted one. Half of the moments are spread evenly over the time that
the command takes, the others over its imports and the files it opens and renames.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.packed.storage import load_packed
from tests.robustness.commands import end, environment, run, start, training, weights

LATE = 0.9  # fraction of a command's events after which its work may be done

# Audit events for imports, opening, renaming and creating files: at the n-th event the process interrupts itself.
# n = 0: it only counts, and prints the number as the last line of stderr.
EVENTS = """
import atexit, os, signal, sys
n, seen = {n}, 0
def event(name, arguments):
    global seen
    if name in ("import", "open", "os.rename", "os.mkdir", "os.remove"):
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(event)
if not n:
    atexit.register(lambda: print(seen, file=sys.stderr))
"""


def moments(arguments: Sequence[str], env: dict[str, str], number: int) -> Iterator[dict[str, float]]:
    """`number` moments of a command, which is run once uninterrupted; its programs are already compiled."""
    began = time.monotonic()
    code, _, error = end(start(arguments, env, prelude=EVENTS.format(n=0)))
    seconds, events = time.monotonic() - began, int(error.splitlines()[-1])
    assert code == 0, error
    for i in range(number):
        share = (i + 0.5) / number
        yield {"share": share} | (
            {"seconds": round(share * seconds, 2)} if i % 2 else {"event": int(share * events)}
        )


def interrupted(arguments: Sequence[str], env: dict[str, str], moment: dict[str, float]) -> tuple[str, str]:
    """("interrupted", "finished" or a description of the fault, stderr) of a command that gets SIGINT at a moment."""
    process = start(arguments, env, prelude=EVENTS.format(n=moment["event"]) if "event" in moment else "")
    if "seconds" in moment:
        time.sleep(moment["seconds"])
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    code, _, error = end(process)
    if "Traceback" in error or "Exception" in error:
        return "traceback", error
    if code == 0 and "event" in moment and moment["share"] < LATE:
        return "ignored", error
    # Python itself dies of the signal, which shells report as 130 too, if it arrives in code compiled from a string.
    ends = {0: "finished", 130: "interrupted", -signal.SIGINT: "interrupted"}
    return ends.get(code, f"exit code {code}"), error


def of_training(number: int, place: Path) -> list[dict[str, Any]]:
    env = environment(place)
    run(training(place, "whole"), env)
    expected, cases = weights(place / "whole"), []
    for moment in moments(training(place, "timed"), env, number):
        shutil.rmtree(place / "run", ignore_errors=True)
        found, error = interrupted(training(place, "run"), env, moment)
        run(training(place, "run"), env)
        if weights(place / "run") != expected:
            found = "other bits after going on"
        cases.append(moment | {"outcome": found, "stderr": error[-400:]})
    return cases


def of_packing(number: int, place: Path) -> list[dict[str, Any]]:
    env, folder = environment(place), place / "packed" / "model"
    cases = []
    (place / "timed").mkdir()
    run(["pack", str(place / "whole"), str(place / "compiles"), "--tokens", "32"], env)
    timed = ["pack", str(place / "whole"), str(place / "timed" / "model"), "--tokens", "32"]
    for moment in moments(timed, env, number):
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        found, error = interrupted(["pack", str(place / "whole"), str(folder), "--tokens", "32"], env, moment)
        if folder.exists():
            load_packed(folder, verify=True)
        if [entry.name for entry in folder.parent.iterdir() if entry != folder]:
            found = "something half-written"
        cases.append(moment | {"outcome": found, "stderr": error[-400:]})
    return cases


def of_reading(arguments: list[str], number: int, place: Path) -> list[dict[str, Any]]:
    """`generate` and `eval`, whose only output file is that of --json."""
    env, figures, cases = environment(place), place / "figures.json", []
    arguments = [*arguments, "--json", str(figures)]
    run(arguments, env)
    for moment in moments(arguments, env, number):
        figures.unlink(missing_ok=True)
        found, error = interrupted(arguments, env, moment)
        if figures.exists():
            json.loads(figures.read_text())
        cases.append(moment | {"outcome": found, "stderr": error[-400:]})
    return cases


def interrupt_all(number: int, place: Path) -> dict[str, Any]:
    """Counts of outcomes by command, and the faults."""
    cases = {"train": of_training(number, place)}
    shutil.rmtree(place / "timed")
    cases["pack"] = of_packing(number, place)
    shutil.rmtree(place / "packed")
    packed = place / "packed"
    run(["pack", str(place / "whole"), str(packed), "--tokens", "32"], environment(place))
    cases["generate"] = of_reading(
        ["generate", str(packed), "--prompt", "A ", "--tokens", "32"], number, place
    )
    cases["eval"] = of_reading(
        ["eval", str(packed), "--source", str(place / "text.txt"), "--split", "tail"], number, place
    )
    outcomes = {
        name: dict(collections.Counter(case["outcome"] for case in found)) for name, found in cases.items()
    }
    faults = [
        {"command": name} | case
        for name, found in cases.items()
        for case in found
        if case["outcome"] not in ("interrupted", "finished")
    ]
    moments = {name: [[case["share"], case["outcome"]] for case in found] for name, found in cases.items()}
    return {"moments": moments, "outcomes": outcomes, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=10, help="of each command")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        found = interrupt_all(args.moments, Path(place))
    found["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(found, indent=2)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
