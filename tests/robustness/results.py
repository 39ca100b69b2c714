"""Runs the probes in full and stores their results, with commit, hardware and versions, in one file.

python -m tests.robustness.results                                  # all of them
python -m tests.robustness.results --probes determinism clocks      # keeps the others' results
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_experiments.provenance import provenance
from bitnet_kernels import cpu
from tests.robustness import determinism, processes
from tests.robustness.commands import ROOT
from tests.robustness.fuzz_packed_folders import fuzz
from tests.robustness.interrupts import interrupt_all
from tests.robustness.kill_pack import kill_often

RESULTS = Path(__file__).parent / "results.json"


def compared(place: Path) -> dict[str, Any]:
    return determinism.compare(determinism.compute(place, cpu.available_isas()))


PROBES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "interrupts": partial(interrupt_all, 10),
    "determinism": compared,
    **{name: partial(processes.outcomes, names=[name]) for name in processes.PROBES},
    "fuzz_packed_folders": partial(fuzz, 20_000, 0),
    "kill_pack": partial(kill_often, 30, 0),
}


def keep(file: Path, name: str, found: dict[str, Any], seconds: float) -> None:
    """Stores the results of a probe in the file, replacing its previous ones."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept[name] = found | {"seconds": round(seconds, 1)} | provenance()
    text = json.dumps(dict(sorted(kept.items())), indent=2)
    for place, word in ((sys.prefix, "ENVIRONMENT"), (str(ROOT), "REPOSITORY")):  # in tracebacks
        text = text.replace(json.dumps(place)[1:-1], word)
    file.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES), help="default: all")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, help="the file (default: results.json beside this one)"
    )
    args = parser.parse_args()
    faulty = []
    for name in args.probes:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            found = PROBES[name](Path(place))
        keep(args.json, name, found, time.monotonic() - began)
        faulty += [name] if found.get("faults") else []
        print(f"{name}: {'faults: ' + str(found['faults']) if name in faulty else 'no fault'}", flush=True)
    return 1 if faulty else 0


if __name__ == "__main__":
    raise SystemExit(main())
