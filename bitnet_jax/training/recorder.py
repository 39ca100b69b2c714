"""Turns the metrics of an update, still on the device, into log rows and progress output."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from bitnet_jax.progress import Progress
from bitnet_jax.training.config_sections import TrainingConfig
from bitnet_jax.training.metrics import MetricsLog
from bitnet_jax.training.spikes import Spikes
from bitnet_jax.training.statistics import Statistics
from bitnet_jax.training.step import Metrics

REFRESH_SECONDS = 0.5  # minimum time between two changes of the progress line


class Diverged(ArithmeticError):
    """The update that led to `step` had a non-finite loss or gradient, or a loss above the limits."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class Recorder:
    """Writes one row per update (per-layer statistics on every `log_every`th) and per evaluation.

    Args:
      paths: names of the layers in `metrics["statistics"]`.
      tokens: targets per update.
      last: newest row of each kind, from before an interruption.
      spikes: what counts as a loss spike.
    """

    def __init__(
        self,
        log: MetricsLog,
        bar: Progress,
        training: TrainingConfig,
        paths: tuple[str, ...],
        tokens: int,
        last: Mapping[str, Any],
        spikes: Spikes,
    ):
        self.log, self.bar, self.training, self.paths, self.tokens = log, bar, training, paths, tokens
        self.last, self.spikes, self.step = dict(last), spikes, 0
        self._before: float | None = None  # time of the last update; None: the next one is not timed
        self._busy_seconds, self._busy_updates = 0.0, 0  # since the last row with a speed
        self._shown = -math.inf

    def update(self, step: int, metrics: Metrics) -> None:
        """Wait for the metrics of the update that led to `step`, and record them.

        Raises:
          Diverged: they are not finite, or the loss is above training.max_loss or that of a spike.
        """
        values = jax.device_get(metrics)
        self._time()
        statistics = values.pop("statistics", None)
        finite = bool(values.pop("finite"))
        row: dict[str, Any] = {name: float(value) for name, value in values.items()}
        measured = statistics is not None and self.paths and step % self.training.statistics_every == 0
        if measured:
            row |= {name: float(value.mean()) for name, value in statistics._asdict().items()}
        self.last["train"] = dict(row)
        if step % self.training.log_every == 0:
            row["tokens_per_second"] = self.speed()
            self._busy_seconds, self._busy_updates = 0.0, 0
            if measured:
                row["layers"] = _by_layer(self.paths, statistics)
        self.log.write(step, "train", row)
        self.step = step
        self._show(row["loss"])
        limits = [limit for limit in (self.training.max_loss, self.spikes.limit()) if limit is not None]
        if not finite or row["loss"] > min(limits, default=math.inf):
            self.log.flush()
            allowed = f"finite numbers and a loss up to {min(limits):.6g}" if limits else "finite numbers"
            raise Diverged(
                step,
                f"update {step} gave loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}, update "
                f"norm {row['update_norm']:.6g}; expected {allowed}; lower optimizer.learning_rate",
            )
        self.spikes.add(row["loss"])

    def rewind(self, step: int, last: Mapping[str, Any]) -> None:
        """Forget what came after `step`, to which the run has returned; `last` as it was then."""
        self.log.rewind(step)
        self.bar.update(step - self.step)
        self.last, self.step = dict(last), step
        self.pause()

    def evaluated(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Kind: valid or test."""
        self.log.write(step, kind, values)
        self.last[kind] = dict(values)

    def pause(self) -> None:
        """Exclude the time until the next update (an evaluation, a save) from the speed."""
        self._before = None

    def speed(self) -> float | None:
        """Tokens per second since the last row that reports it; None: no update was timed."""
        return self._busy_updates * self.tokens / self._busy_seconds if self._busy_seconds else None

    def _time(self) -> None:
        now = time.monotonic()
        if self._before is not None:
            # Clamped at zero: the clock may go backwards when a virtual machine is migrated.
            self._busy_seconds += max(0.0, now - self._before)
            self._busy_updates += 1
        self._before = now

    def _show(self, loss: float) -> None:
        if time.monotonic() - self._shown > REFRESH_SECONDS:
            self._shown = time.monotonic()
            speed = self.speed()
            shown = {"loss": f"{loss:.4f}"} | ({} if speed is None else {"tokens/s": f"{speed:,.0f}"})
            if "valid" in self.last:
                shown["valid"] = f"{self.last['valid']['loss']:.4f}"
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update()


def _by_layer(paths: tuple[str, ...], statistics: Statistics) -> dict[str, dict[str, float]]:
    columns = {name: values.tolist() for name, values in statistics._asdict().items()}
    return {path: {name: column[i] for name, column in columns.items()} for i, path in enumerate(paths)}
