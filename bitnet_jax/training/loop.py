"""The host loop around the jitted step: resume, evaluate, checkpoint, stop cleanly.

    result = fit(config, "runs/first")

`fit` may be killed at any moment: started again with the same config and folder it resumes from the last complete
checkpoint, and its result is bit-identical to an uninterrupted run.

A run whose `training.steps` is raised, finished or not, resumes in the same way. Anything that depends on the total
number of updates (a schedule other than constant, the end of weight decay, annealed gradients) follows the new total
from then on, so the run differs from one started with that total; if nothing depends on it, both are bit-identical.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

import bitnet_jax
from bitnet_jax.progress import progress_bar
from bitnet_jax.quantization.ste import ANNEALED
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.interrupt import Interrupted, StopRequest, stop_on_signals
from bitnet_jax.training.limits import check_trainable
from bitnet_jax.training.metrics import MetricsLog, read_metrics
from bitnet_jax.training.optimizers import make_optimizer
from bitnet_jax.training.recorder import Diverged, Recorder
from bitnet_jax.training.run_folder import EXTENDED_FROM, RunError, RunFolder
from bitnet_jax.training.sharding import (
    batch_sharding,
    make_mesh,
    needs_synchronous_dispatch,
    state_shardings,
    with_shardings,
)
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.statistics import quantized_paths
from bitnet_jax.training.step import Metrics, make_train_step
from bitnet_jax.training.task import Task
from bitnet_jax.training.tasks import TASKS


def fit(
    config: RunConfig | Mapping[str, Any],
    workdir: str | Path,
    progress: bool = True,
    *,
    overwrite: bool = False,
    task: Callable[[RunConfig], Task] | None = None,
) -> dict[str, Any]:
    """Train the model of `config` on its task in `workdir`, resuming the run in that folder, if any.

    Args:
      progress: show a progress bar on stderr, or occasional lines if it is not a terminal.
      overwrite: train from scratch; the existing run is removed once the data has been read.
      task: builds the task, in place of the function named by `config.task`.

    Returns:
      The content of `result.json`: status ("finished" or "diverged"), step, newest train and valid measurements,
      parameters, tokens, seconds, config_hash, versions, and extended_from (earlier values of training.steps) if
      training.steps was changed, and for text data (sizes and skipped files of each source). A completed run is not
      trained again.

    Raises:
      ValueError, FileNotFoundError: an invalid config, a model that cannot be trained here or packed, unusable data,
        or too few devices for the mesh. The folder is left unchanged.
      RunError, CheckpointError: the folder holds another run or only damaged checkpoints, or cannot be written.
      Interrupted: SIGINT or SIGTERM was received; the run is saved and can be resumed.
    """
    if not isinstance(config, RunConfig):
        config = RunConfig.from_dict(config)
    folder = RunFolder(workdir)
    if overwrite:
        folder.check_overwritable()
    elif (result := folder.result_under(config)) is not None:
        return result
    check_trainable(config)
    problem = (task or TASKS[config.task])(config)
    with folder.training(config, overwrite=overwrite) as result:
        return train(problem, config, folder, progress) if result is None else result


def train(task: Task, config: RunConfig, folder: RunFolder, progress: bool = True) -> dict[str, Any]:
    """`fit` for any task. The caller must be inside `folder.training(config)`, which yielded no result."""
    if task.tokenizer is not None:
        folder.write_tokenizer(task.tokenizer)
    if task.classes is not None:
        folder.write_classes(task.classes)
    try:
        result = _train(task, config, folder, progress)
    except OSError as error:
        raise RunError(
            f"cannot write in {folder.path}: {error.strerror or error}; free disk space or fix permissions, then "
            "start again to resume from the last checkpoint"
        ) from error
    folder.write_result(result)
    return result


def _train(task: Task, config: RunConfig, folder: RunFolder, progress: bool) -> dict[str, Any]:
    training, mesh = config.training, make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, training.steps)
    init_key, key = jax.random.split(jax.random.key(config.seed))

    def create(key: PRNGKeyArray) -> TrainState:
        return TrainState.create(task.init(key), optimizer)

    shapes = jax.eval_shape(create, init_key)
    shardings = state_shardings(mesh, shapes)
    shapes = with_shardings(shapes, shardings)
    # The key is an argument: with a constant key XLA would try to constant-fold the random numbers.
    fresh = partial(jax.jit(create, out_shardings=shardings), init_key)
    update = make_train_step(
        task.loss,
        optimizer,
        total_steps=training.steps,
        precisions=task.precisions,
        accumulate=training.accumulate,
        statistics_every=training.statistics_every,
        shardings=shardings,
    )

    def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        batch = jax.device_put(task.train_batch(step), batch_sharding(mesh))
        advanced = update(state, batch, key)
        return jax.block_until_ready(advanced) if needs_synchronous_dispatch(mesh) else advanced

    began, name = time.monotonic(), folder.path.absolute().name
    with contextlib.ExitStack() as stack:
        stop_request = stack.enter_context(stop_on_signals())
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(
            Checkpoints(folder.checkpoints, keep=training.keep_checkpoints, keep_best=training.keep_best)
        )
        state, meta = _start(fresh, shapes, checkpoints, task, folder, config)
        first = int(state.step)
        folder.result.unlink(missing_ok=True)  # left from the shorter run
        folder.write_config(config, meta[EXTENDED_FROM])
        board = folder.path / "tensorboard" if training.tensorboard else None
        log = stack.enter_context(MetricsLog(folder.metrics, resume_step=first, tensorboard=board))
        bar = stack.enter_context(
            progress_bar(training.steps, unit="step", description=name, initial=first, show=progress)
        )
        recorder = Recorder(log, bar, training, quantized_paths(task.precisions), task.tokens, meta["last"])
        run = _Run(task, config, folder, checkpoints, log, recorder, stop_request, meta, began)
        if first == training.steps and not _evaluated(folder.metrics, first):
            run.evaluate_and_checkpoint(state, first, saves=False)  # steps was lowered to the step reached
        step, problem = run.updates(state, first, advance)
        checkpoints.wait()
        kept = max(checkpoints.steps(), default=0)

    if problem is not None:
        print(f"stopped: {problem}; the last good checkpoint is at step {kept}", file=sys.stderr)
    elif step < training.steps:
        signal = stop_request.signal
        assert signal is not None  # nothing else ends the loop early
        print(f"{signal.name}: saved step {step} of {training.steps}; start again to resume", file=sys.stderr)
        raise Interrupted(128 + signal)
    return {
        "status": "finished" if problem is None else "diverged",
        "message": None if problem is None else str(problem),
        "step": step,
        "steps": training.steps,
        **run.extended,
        **recorder.last,
        **({} if task.data is None else {"data": dict(task.data)}),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        "tokens": step * task.tokens,
        "seconds": run.seconds(),
        "seed": config.seed,
        "config_hash": config.hash(),
        "versions": {
            "bitnet_jax": bitnet_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
    }


@dataclasses.dataclass(frozen=True)
class _Run:
    """The resources of a run in training: task, folder, checkpoints and logs."""

    task: Task
    config: RunConfig
    folder: RunFolder
    checkpoints: Checkpoints
    log: MetricsLog
    recorder: Recorder
    stop_request: StopRequest
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
        try:
            while step < training.steps:
                state, metrics = advance(state, step)
                step += 1
                if in_flight is not None:
                    self.recorder.update(*in_flight)
                in_flight = (step, metrics)
                stop, last = self.stop_request.signal is not None, step == training.steps
                evaluates = last or step % training.eval_every == 0
                saves = last or stop or step % training.checkpoint_every == 0
                if evaluates or saves:
                    self.recorder.update(*in_flight)
                    in_flight = None
                    self.evaluate_and_checkpoint(state, step, evaluates=evaluates, saves=saves)
                if stop:
                    break
        except Diverged as problem:
            return problem.step, problem
        return step, None

    def evaluate_and_checkpoint(
        self, state: TrainState, step: int, *, evaluates: bool = True, saves: bool = True
    ) -> None:
        values = self.task.evaluate(state.variables) if evaluates else None
        if values is not None:
            self.recorder.valid(step, values)
        if saves:
            self.log.flush()  # rows up to a checkpoint are on disk before it is
            meta = {
                "config": self.config.to_dict(),
                "data": self.task.fingerprint,
                "data_position": step,
                "seconds": self.seconds(),
                "last": self.recorder.last,
                "files_crc32": self.folder.files_crc32(),
                **self.extended,
            }
            loss = values["loss"] if values is not None else None
            self.checkpoints.save(step, state.variables, state.opt_state, meta, loss)
        self.recorder.pause()


def _start(
    fresh: Callable[[], TrainState],
    shapes: TrainState,
    checkpoints: Checkpoints,
    task: Task,
    folder: RunFolder,
    config: RunConfig,
) -> tuple[TrainState, dict[str, Any]]:
    """The state to start from, and the checkpoint's meta: seconds spent, last rows, earlier totals."""
    check = partial(folder.check_meta, config)
    restored = checkpoints.restore_latest_intact(shapes.variables, shapes.opt_state, check)
    if restored is None:
        return fresh(), {"seconds": 0.0, "last": {}, EXTENDED_FROM: []}
    if restored.meta["data"] != task.fingerprint:
        raise RunError(
            f"{folder.path}: got training data with checksum {task.fingerprint:08x}, expected "
            f"{restored.meta['data']:08x}, the data this run began with; restore it or use another folder"
        )
    earlier, before = restored.meta.get(EXTENDED_FROM, []), restored.meta["config"]["training"]["steps"]
    if before != config.training.steps:
        earlier = [*earlier, before]
        print(_extension_notice(config, task, before, restored.step), file=sys.stderr)
    step = jax.device_put(jnp.int32(restored.step), shapes.step.sharding)
    model_state = {name: part for name, part in restored.variables.items() if name != "params"}
    state = TrainState(step, restored.variables["params"], restored.opt_state, model_state)
    return state, restored.meta | {EXTENDED_FROM: earlier}


def _extension_notice(config: RunConfig, task: Task, before: int, step: int) -> str:
    """One line: where a run with a changed training.steps resumes, and whether that changes its updates."""
    steps, optimizer = config.training.steps, config.optimizer
    stes = {ste for p in task.precisions.values() for ste in (p.weight_ste, p.activation_ste)}
    follows = [f"schedule={optimizer.schedule!r}"] if optimizer.schedule != "constant" else []
    if optimizer.weight_decay and optimizer.weight_decay_until < 1:
        follows.append(f"weight_decay_until={optimizer.weight_decay_until}")
    follows += [f"the gradient {ste!r}" for ste in sorted(stes & ANNEALED)]
    effect = (
        f"with {', '.join(follows)} computed for {steps} from here on; differs from a run started with {steps}"
        if follows
        else f"bit-identical to a run started with {steps}"
    )
    return f"training.steps: {before} before, {steps} now; resuming from step {step}, {effect}"


def _evaluated(metrics: Path, step: int) -> bool:
    rows = read_metrics(metrics) if metrics.exists() else ()
    return any(row["step"] == step and row.get("kind") == "valid" for row in rows)
