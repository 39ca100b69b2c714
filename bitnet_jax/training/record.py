"""Where the time of a run went, over all its processes, and what it took: speed, peak share, memory, energy.

    setup           from `fit` to the first update: data, the measured peak of a CPU, restored checkpoints
    compilation     the first update of a process, until it is dispatched
    training        updates that the run has kept; the only productive time, see `goodput`
    evaluation      on held-out data, its compilation included
    checkpointing   copying the state; writing it overlaps with updates and counts only where the run waits for it
    lost            updates that were done, then lost with their process, or undone

The state is kept in the meta of every checkpoint and, at least every BEAT_SECONDS while updates are done, in the file
`record.json` beside the summary. From that file the next process learns what a killed one did after its checkpoint. The
host only reads clocks and counters, and only where it waits for an update anyway.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitnet_jax.evaluation.meters import Meter, open_meters
from bitnet_jax.training.hardware import Peak, peak_memory

ACTIVITIES = ("setup", "compilation", "training", "evaluation", "checkpointing", "lost")
BEAT_SECONDS = 2.0


@dataclasses.dataclass
class Totals:
    """Sums over the processes of a run, as stored."""

    run: str = ""  # identifies the run that a file belongs to
    starts: int = 0
    updates: int = 0  # kept ones
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    joules: dict[str, float] = dataclasses.field(default_factory=dict)  # by meter
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # peaks, see hardware.peak_memory


class Work(NamedTuple):
    """What an update computes, and on what."""

    tokens: int
    flops_per_token: float | None  # see flops.py
    peak: Peak


class RunRecord:
    """Accounts the time of one process of a run, after that of the earlier ones.

    Args:
      file: rewritten while the run proceeds; None: only the checkpoints hold the state.
      run: the same for every process of the run.
      work: of an update.
      devices: those of the mesh in this process, whose memory is reported.
      began: time.monotonic() when the run started in this process.
      saved: `state()` in the meta of the checkpoint that the run resumes from; None: it starts from scratch, or from a
        checkpoint of a version without records, in which case only what follows is recorded.
    """

    def __init__(
        self,
        file: Path | None,
        run: str,
        work: Work,
        devices: Sequence[Any],
        began: float,
        saved: Mapping[str, Any] | None,
    ):
        self.file, self.work, self.devices = file, work, devices
        # Bytes that a device receives in an update (collectives.py); None: of one device, or not known
        self.received: dict[str, dict[str, int]] | None = None
        self.totals = _after(saved, None if file is None else read_totals(file), run)
        self.totals.starts += 1
        self.activity, self._since, self._beat = "setup", began, began
        self.meters, self.absent = open_meters()
        self._readings = {meter.name: meter.read() for meter in self.meters}

    def enter(self, activity: str) -> None:
        """What is done from now on is `activity`."""
        if activity != self.activity:
            self._account()
            self.activity = activity
            self._write()

    def updated(self) -> None:
        """The metrics of an update have arrived."""
        self.totals.updates += 1
        if time.monotonic() - self._beat > BEAT_SECONDS:
            self._account()
            self._write()

    def undo(self, saved: Mapping[str, Any] | None) -> None:
        """The run goes back to the checkpoint with this state (None: to the start): updates since then are lost."""
        self._account()
        self.totals = _after(saved, self.totals, self.totals.run)

    def state(self) -> dict[str, Any]:
        """For the meta of a checkpoint."""
        self._account()
        return dataclasses.asdict(self.totals)

    def close(self) -> None:
        self._account()
        self._write()

    def _account(self) -> None:
        now, totals = time.monotonic(), self.totals
        # Clamped at zero: the clock may go backwards when a virtual machine is migrated.
        totals.seconds[self.activity] += max(0.0, now - self._since)
        self._since = now
        for meter in self.meters:
            self._read(meter)
        for name, peak in peak_memory(self.devices).items():
            totals.memory[name] = max(totals.memory.get(name, 0), peak)

    def _read(self, meter: Meter) -> None:
        try:
            reading = meter.read()
        except Exception as error:  # drivers raise all kinds of exceptions
            self.meters.remove(meter)
            self.absent[meter.name] = f"could no longer be read: {error}"
            return
        joules = meter.between(self._readings[meter.name], reading)
        self._readings[meter.name] = reading
        self.totals.joules[meter.name] = self.totals.joules.get(meter.name, 0.0) + joules

    def _write(self) -> None:
        self._beat = time.monotonic()
        if self.file is not None:
            temporary = self.file.with_name(self.file.name + ".tmp")
            content = {"totals": dataclasses.asdict(self.totals), "summary": self.summary()}
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            temporary.replace(
                self.file
            )  # not synced: a killed process leaves it, and a crash may lose 2 seconds

    def summary(self) -> dict[str, Any]:
        """The section `record` of result.json, as of the last account."""
        totals, (tokens, flops, peak) = self.totals, self.work
        wall, productive, joules = sum(totals.seconds.values()), totals.seconds["training"], totals.joules
        speed = totals.updates * tokens / productive if productive else None
        known = speed is not None and flops is not None and peak.flops is not None
        return {
            "starts": totals.starts,
            "updates": totals.updates,
            "wall_seconds": wall,
            "seconds": dict(totals.seconds),
            "goodput": productive / wall if wall else None,
            "tokens_per_second": speed,
            "flops_per_token": flops,
            "peak_flops_per_second": peak.flops,
            "peak": peak.source,
            "mfu": speed * flops / peak.flops if known else None,  # type: ignore[operator]
            "peak_memory_bytes": dict(totals.memory),
            "joules": dict(joules),
            "joules_per_token": sum(joules.values()) / (totals.updates * tokens)
            if joules and totals.updates
            else None,
            "meters_absent": dict(self.absent),
            "received_bytes_per_update": self.received,
        }


def read_totals(file: Path) -> Totals | None:
    """None: no such file, or it is damaged."""
    try:
        return _totals(json.loads(file.read_text(encoding="utf-8"))["totals"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _totals(fields: Mapping[str, Any]) -> Totals:
    totals = Totals(**fields)
    seconds = {name: float(totals.seconds[name]) for name in ACTIVITIES if name in totals.seconds}
    return dataclasses.replace(
        totals,
        starts=int(totals.starts),
        updates=int(totals.updates),
        seconds=dict.fromkeys(ACTIVITIES, 0.0) | seconds,
        joules=dict(totals.joules),
        memory=dict(totals.memory),
    )


def _after(saved: Mapping[str, Any] | None, left: Totals | None, run: str) -> Totals:
    """The totals to continue from: those that the last process left, without the updates after the checkpoint."""
    kept = Totals(run=run) if saved is None else _totals(saved)
    if left is None or left.run != kept.run or left.starts < kept.starts:
        return kept
    undone = max(0.0, left.seconds["training"] - kept.seconds["training"])
    seconds = left.seconds | {
        "training": left.seconds["training"] - undone,
        "lost": left.seconds["lost"] + undone,
    }
    return dataclasses.replace(left, updates=kept.updates, seconds=seconds)
