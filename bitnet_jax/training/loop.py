"""The host loop around the jitted step: resume, evaluate, checkpoint, stop cleanly.

    result = fit(config, "runs/first")

`fit` may be killed at any moment: started again with the same config and folder it resumes from the last complete
checkpoint, and its result is bit-identical to an uninterrupted run.

A run whose `training.steps` is raised, finished or not, resumes in the same way. Anything that depends on the total
number of updates (a schedule other than constant, the end of weight decay, annealed gradients, a warm-up) follows the
new total from then on, so the run differs from one started with that total; if nothing depends on it, both are
bit-identical.
"""

from __future__ import annotations

import contextlib
import math
import platform
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

import bitnet_jax
from bitnet_jax.models.stacked import is_stacked, stack_like, unstack
from bitnet_jax.progress import progress_bar
from bitnet_jax.quantization.precision import annealed
from bitnet_jax.training.adapter_task import adapter_task, with_base
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.collectives import collectives, received_bytes
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.distributed import (
    AnyProcess,
    connect,
    everywhere,
    is_alone,
    is_first,
    lost_process,
    tell,
)
from bitnet_jax.training.flops import run_flops_per_token
from bitnet_jax.training.hardware import peak_flops
from bitnet_jax.training.initial import initial_values, read_initial, with_shape
from bitnet_jax.training.interrupt import Interrupted, stop_on_signals
from bitnet_jax.training.limits import check_trainable
from bitnet_jax.training.metrics import MetricsLog, read_metrics
from bitnet_jax.training.optimizers import average_warning, make_optimizer
from bitnet_jax.training.parameter_labels import path_factors
from bitnet_jax.training.record import RunRecord, Work
from bitnet_jax.training.recorder import Recorder
from bitnet_jax.training.run_folder import EXTENDED_FROM, RunError, RunFolder
from bitnet_jax.training.sharding import (
    make_mesh,
    needs_synchronous_dispatch,
    place_batch,
    state_shardings,
    with_shardings,
)
from bitnet_jax.training.spikes import Spikes
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.statistics import quantized_paths
from bitnet_jax.training.step import Batch, Metrics, TrainStep, make_train_step
from bitnet_jax.training.task import Task
from bitnet_jax.training.tasks import TASKS
from bitnet_jax.training.updates import Run


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
      test_* (with data.test), parameters, tokens, seconds, record (see training/record.py), config_hash, versions,
      extended_from (earlier values of training.steps) if training.steps was changed, and for text data (sizes and
      skipped files of each source). A completed run is not trained again.

    Raises:
      ValueError, FileNotFoundError: an invalid config, a model that cannot be trained here or packed, unusable data,
        or too few devices for the mesh. The folder is left unchanged.
      RunError, CheckpointError: the folder holds another run or only damaged checkpoints, or cannot be written.
      Interrupted: SIGINT or SIGTERM was received; the run is saved and can be resumed.
      OtherProcessFailed: another of several processes failed or was lost.
    """
    began = time.monotonic()
    if not isinstance(config, RunConfig):
        config = RunConfig.from_dict(config)
    connect(config.distributed)
    adapts = config.adapter.rank is not None
    initial = None if config.init is None or adapts else everywhere(partial(read_initial, config.init))
    if initial is not None:
        config = with_shape(config, initial)
    if adapts:
        config = with_base(config)
    folder = RunFolder(workdir)
    result = everywhere(partial(_finished, folder, config, overwrite), only_first=True)
    if result is not None:
        return result
    check_trainable(config)
    problem = everywhere(partial(task or TASKS[config.task], config))
    if adapts:
        problem = adapter_task(problem, config)
    if initial is not None:
        problem = problem._replace(init=partial(initial_values, problem.init, initial))
    if initial is not None or config.optimizer.rates:  # an error before the folder exists
        shapes = jax.eval_shape(problem.init, jax.random.key(0))
        path_factors(shapes["params"], config.optimizer.rates or {})
    with contextlib.ExitStack() as stack:
        lock = folder.training(config, overwrite=overwrite)
        result = everywhere(partial(stack.enter_context, lock), only_first=True)
        return train(problem, config, folder, progress, began) if result is None else result


def _finished(folder: RunFolder, config: RunConfig, overwrite: bool) -> dict[str, Any] | None:
    """The result of a completed run, unless it is to be overwritten."""
    if overwrite:
        folder.check_overwritable()
        return None
    return folder.result_under(config)


def train(
    task: Task, config: RunConfig, folder: RunFolder, progress: bool = True, began: float | None = None
) -> dict[str, Any]:
    """`fit` for any task. The caller must be inside `folder.training(config)`, which yielded no result.

    Args:
      began: time.monotonic() from which on the time of the run is recorded; None: now.
    """

    def write() -> None:
        if task.tokenizer is not None:
            folder.write_tokenizer(task.tokenizer)
        if task.classes is not None:
            folder.write_classes(task.classes)

    everywhere(write, only_first=True)
    try:
        result = _train(task, config, folder, progress, time.monotonic() if began is None else began)
    except OSError as error:
        raise RunError(
            f"cannot write in {folder.path}: {error.strerror or error}; free disk space or fix permissions, then "
            "start again to resume from the last checkpoint"
        ) from error
    everywhere(partial(folder.write_result, result), only_first=True)
    return result


def _train(
    task: Task, config: RunConfig, folder: RunFolder, progress: bool, recorded_from: float
) -> dict[str, Any]:
    training, mesh = config.training, make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, training.steps, config.width_ratio)
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

    programs: list[TrainStep] = []  # the update, once it is compiled

    def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        rows = partial(task.train_batch, spikes.position(step))
        batch = place_batch(rows, config.data.batch_size, mesh)
        if not programs:
            programs.append(update if mesh.size == 1 else _compiled(update, state, batch, key, record))
        advanced = programs[0](state, batch, key, *([task.frozen] if task.frozen else []))
        return jax.block_until_ready(advanced) if needs_synchronous_dispatch(mesh) else advanced

    if (warning := average_warning(config.optimizer, task.precisions)) is not None:
        tell(warning)
    if (notice := _warm_up_notice(config, task)) is not None:
        tell(notice)
    began, name = time.monotonic(), folder.path.absolute().name
    with contextlib.ExitStack() as stack:
        stop_request = stack.enter_context(stop_on_signals())
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(
            Checkpoints(folder.checkpoints, keep=training.keep_checkpoints, keep_best=training.keep_best)
        )
        start = partial(_start, fresh, shapes, checkpoints, task, folder, config)
        state, meta = start()
        spikes = Spikes(training, meta.get("spikes"))
        first = int(state.step)
        everywhere(partial(_write_settings, folder, config, meta), only_first=True)
        writes = is_first()
        board = folder.path / "tensorboard" if training.tensorboard and writes else None
        metrics, samples = (folder.metrics, folder.samples) if writes else (None, None)
        log = stack.enter_context(MetricsLog(metrics, resume_step=first, tensorboard=board))
        texts = None
        if task.sample is not None:
            beside = None if board is None else board / "samples"
            texts = stack.enter_context(MetricsLog(samples, resume_step=first, tensorboard=beside))
        shown = progress and writes
        bar = stack.enter_context(
            progress_bar(training.steps, unit="step", description=name, initial=first, show=shown)
        )
        paths = quantized_paths(task.precisions)
        recorder = Recorder(log, bar, training, paths, task.tokens, meta["last"], spikes)
        work = Work(
            task.tokens, run_flops_per_token(config, task.tokenizer), peak_flops(list(mesh.devices.flat))
        )
        file = folder.record if writes else None
        record = RunRecord(file, config.hash(), work, mesh.local_devices, recorded_from, meta.get("record"))
        files = (folder, checkpoints, log, recorder, record, texts)
        run = Run(task, optimizer, config, *files, stop_request, AnyProcess(mesh), meta, began)
        try:
            if first == training.steps and not everywhere(
                partial(_evaluated, folder.metrics, first), only_first=True
            ):
                run.evaluate_and_checkpoint(
                    state, first, saves=False
                )  # steps was lowered to the step reached
            step, problem = run.updates(state, first, advance)
            while problem is not None and spikes.may_return():
                state = run.go_back(problem, start)
                step, problem = run.updates(state, int(state.step), advance)
            record.enter("checkpointing")
            checkpoints.wait()
            record.close()
        except jax.errors.JaxRuntimeError as error:
            if is_alone():
                raise
            raise lost_process(error) from error
        kept = max(checkpoints.steps(), default=0)

    if problem is not None:
        tell(f"stopped: {problem}; the last good checkpoint is at step {kept}")
    elif step < training.steps:
        received = stop_request.signal or signal.SIGTERM  # it may have reached another process only
        tell(f"{received.name}: saved step {step} of {training.steps}; start again to resume")
        raise Interrupted(128 + received)
    return {
        "status": "finished" if problem is None else "diverged",
        "message": None if problem is None else str(problem),
        "step": step,
        "steps": training.steps,
        **run.extended,
        **({"returns": spikes.returns} if training.max_returns else {}),
        **{kind: row for kind, row in recorder.last.items() if kind != "test"},
        **({} if problem is not None else _tested(recorder.last)),
        **({} if task.data is None else {"data": dict(task.data)}),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        "tokens": step * task.tokens,
        "seconds": run.seconds(),
        "record": record.summary(),
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


def _tested(last: Mapping[str, Any]) -> dict[str, float]:
    """`test_<metric>` of the test data, if there is some."""
    return {f"test_{name}": value for name, value in last.get("test", {}).items()}


def _compiled(
    update: TrainStep, state: TrainState, batch: Batch, key: PRNGKeyArray, record: RunRecord
) -> TrainStep:
    """The update compiled ahead of its first call, which is no second compilation; the record gets what it moves."""
    program = update.lower(state, batch, key).compile()  # type: ignore[attr-defined]
    if is_first():
        try:
            record.received = received_bytes(collectives(program.as_text()))
        except ValueError as error:  # a loop whose length is not known before it runs
            tell(f"the bytes that an update moves are unknown: {error}")
    return program


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
    saved = jax.eval_shape(unstack, shapes)
    saved = with_shardings(saved, state_shardings(shapes.step.sharding.mesh, saved))
    restored = checkpoints.restore_latest_intact(saved.variables, saved.opt_state, check)
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
        tell(_extension_notice(config, task, before, restored.step))
    step = jax.device_put(jnp.int32(restored.step), shapes.step.sharding)
    model_state = {name: part for name, part in restored.variables.items() if name != "params"}
    state = TrainState(step, restored.variables["params"], restored.opt_state, model_state)
    if any(map(is_stacked, shapes.params)):
        state = jax.jit(
            partial(stack_like, like=shapes), out_shardings=jax.tree.map(lambda x: x.sharding, shapes)
        )(state)
    return state, restored.meta | {EXTENDED_FROM: earlier}


def _write_settings(folder: RunFolder, config: RunConfig, meta: Mapping[str, Any]) -> None:
    folder.result.unlink(missing_ok=True)  # left from the shorter run
    folder.write_config(config, meta[EXTENDED_FROM])


def _extension_notice(config: RunConfig, task: Task, before: int, step: int) -> str:
    """One line: where a run with a changed training.steps resumes, and whether that changes its updates."""
    steps, optimizer = config.training.steps, config.optimizer
    follows = [f"schedule={optimizer.schedule!r}"] if optimizer.schedule != "constant" else []
    if optimizer.weight_decay and optimizer.weight_decay_until < 1:
        follows.append(f"weight_decay_until={optimizer.weight_decay_until}")
    follows += annealed(task.precisions.values())
    if share := config.model.get("sub_norm_warmup"):
        follows.append(f"sub_norm_warmup={share}")
    effect = (
        f"with {', '.join(follows)} computed for {steps} from here on; differs from a run started with {steps}"
        if follows
        else f"bit-identical to a run started with {steps}"
    )
    return f"training.steps: {before} before, {steps} now; resuming from step {step}, {effect}"


def _warm_up_notice(config: RunConfig, task: Task) -> str | None:
    """One line if the losses of updates are for a time not those of the model that is evaluated; else None."""
    shares = [config.model.get("sub_norm_warmup", 0.0), *(p.warmup for p in task.precisions.values())]
    if not (share := max(shares)):
        return None
    return (
        f"warm-up: updates before {math.ceil(share * config.training.steps)} train a blend with the float model; "
        "evaluations, samples and packed models are of the final one (quantized, with its sub norms)"
    )


def _evaluated(metrics: Path, step: int) -> bool:
    rows = read_metrics(metrics) if metrics.exists() else ()
    return any(row["step"] == step and row.get("kind") == "valid" for row in rows)
