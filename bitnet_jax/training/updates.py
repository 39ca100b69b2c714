"""The updates of a run one after another: evaluations, checkpoints, stop requests, returns after a loss spike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PyTree

from bitnet_jax.models.stacked import unstack
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.distributed import AnyProcess, tell
from bitnet_jax.training.interrupt import StopRequest
from bitnet_jax.training.metrics import MetricsLog
from bitnet_jax.training.optimizers import Optimizer
from bitnet_jax.training.record import RunRecord
from bitnet_jax.training.recorder import Diverged, Recorder
from bitnet_jax.training.run_folder import EXTENDED_FROM, RunFolder
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import Metrics
from bitnet_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """The resources of a run in training: task, folder, checkpoints and logs."""

    task: Task
    optimizer: Optimizer
    config: RunConfig
    folder: RunFolder
    checkpoints: Checkpoints
    log: MetricsLog
    recorder: Recorder
    record: RunRecord
    texts: MetricsLog | None  # for samples
    stop_request: StopRequest
    stops: AnyProcess
    meta: dict[str, Any]  # of the checkpoint it resumed from, see _start
    began: float  # time.monotonic() when this process started the run

    @property
    def extended(self) -> dict[str, Any]:
        earlier = self.meta[EXTENDED_FROM]
        return {EXTENDED_FROM: earlier} if earlier else {}

    def seconds(self) -> float:
        """Training time over all processes of the run."""
        return self.meta["seconds"] + max(0.0, time.monotonic() - self.began)

    def updates(
        self, state: TrainState, step: int, advance: Callable[[TrainState, int], tuple[TrainState, Metrics]]
    ) -> tuple[int, Diverged | None]:
        """Train until the last update, a stop request or divergence; returns the step reached and the divergence.

        The next update is dispatched before the host reads the metrics of the previous one, to keep the device busy.
        Only states known to be finite are evaluated and saved.
        """
        training, in_flight = self.config.training, None
        self.record.enter("compilation")
        try:
            while step < training.steps:
                state, metrics = advance(state, step)
                self.record.enter("training")
                step += 1
                if in_flight is not None:
                    self._updated(*in_flight)
                in_flight = (step, metrics)
                stop = self.stops(self.stop_request.signal is not None)
                last = step == training.steps
                evaluates = last or step % training.eval_every == 0
                saves = last or stop or step % training.checkpoint_every == 0
                if evaluates or saves:
                    self._updated(*in_flight)
                    in_flight = None
                    self.evaluate_and_checkpoint(state, step, evaluates=evaluates, saves=saves)
                if stop:
                    break
        except Diverged as problem:
            return problem.step, problem.with_traceback(None)  # which would keep this state in memory
        return step, None

    def evaluate(
        self, state: TrainState, metrics: Callable[[Mapping[str, PyTree]], dict[str, float]]
    ) -> dict[str, float]:
        """The metrics, and with optimizer.ema_decay those of the averaged weights as `ema_<name>`."""
        values = metrics(state.variables)
        average = self.optimizer.averaged(state.opt_state)
        if average is None:
            return values
        of_average = metrics({"params": average, **state.model_state})
        return values | {f"ema_{name}": value for name, value in of_average.items()}

    def go_back(
        self, problem: Diverged, start: Callable[[], tuple[TrainState, dict[str, Any]]]
    ) -> TrainState:
        """Return to the newest checkpoint, or to the start, with the batches since then skipped; see spikes.py."""
        self.record.enter("checkpointing")
        self.checkpoints.wait()
        state, meta = start()
        step, spikes = int(state.step), self.recorder.spikes
        spikes.go_back(problem.step, step, str(problem), meta.get("spikes"))
        self.record.undo(meta.get("record"))
        self.recorder.rewind(step, meta["last"])
        if self.texts is not None:
            self.texts.rewind(step)
        first, last = spikes.returns[-1]["skipped"]
        tell(
            f"{problem}; back to step {step} without batches {first} to {last} "
            f"(return {len(spikes.returns)} of {spikes.most})"
        )
        return state

    def _updated(self, step: int, metrics: Metrics) -> None:
        self.recorder.update(step, metrics)
        self.record.updated()

    def evaluate_and_checkpoint(
        self, state: TrainState, step: int, *, evaluates: bool = True, saves: bool = True
    ) -> None:
        self.record.enter("evaluation")
        values = self.evaluate(state, self.task.evaluate) if evaluates else None
        if values is not None:
            self.recorder.evaluated(step, "valid", values)
        if evaluates and step == self.config.training.steps and self.task.test is not None:
            self.recorder.evaluated(step, "test", self.evaluate(state, self.task.test))
        if evaluates and self.task.sample is not None and self.texts is not None:
            for number, sample in enumerate(self.task.sample(unstack(state).variables)):
                self.texts.write(step, f"sample_{number}", sample._asdict())
            self.texts.flush()
        self.record.enter("checkpointing")
        if saves:
            self.log.flush()  # rows up to a checkpoint are on disk before it is
            meta = {
                "config": self.config.to_dict(),
                "data": self.task.fingerprint,
                "data_position": self.recorder.spikes.position(step),
                "spikes": self.recorder.spikes.state(),
                "seconds": self.seconds(),
                "record": self.record.state(),
                "last": self.recorder.last,
                "files_crc32": self.folder.files_crc32(),
                **self.extended,
            }
            loss = values["loss"] if values is not None else None
            saved = unstack(state)  # under the names per layer, which do not depend on training.scan_layers
            self.checkpoints.save(step, saved.variables, saved.opt_state, meta, loss)
        self.record.enter("training")
        self.recorder.pause()
