"""Atomic, checksummed checkpoints on top of Orbax; restoring uses the newest intact one.

    <folder>/<step>/{variables, optimizer, meta}

Orbax writes under a temporary name and renames, so a killed process leaves no partial checkpoint. It does not
detect flipped bits in the stored arrays, so `meta` also holds a checksum of every array (checksums.py). Saving runs in
the background; its errors are raised by the next `save`, `wait` or `close`.

With several processes (distributed.py) all make the same calls; each writes and reads its own parts of the arrays, and
another number of processes can restore the checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from bitnet_jax.training.checksums import checksums, crc32s
from bitnet_jax.training.distributed import OtherProcessFailed, everywhere, is_alone

logger = logging.getLogger(__name__)

TEMPORARY = "*.orbax-checkpoint-tmp*"
CHECKSUMS = "checksums"  # in meta; before, "crc32"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message is a single line."""


class Restored(NamedTuple):
    step: int
    variables: PyTree
    opt_state: PyTree | None
    meta: dict[str, Any]


def saved_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, oldest first; empty if the folder does not exist."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


class Checkpoints:
    """The checkpoints of one run. Use as a context manager, or call `close`.

    Args:
      folder: created if missing, except with read_only.
      keep: number of newest checkpoints to keep. At least 2, so that one survives while the next is written.
      keep_best: also keep the checkpoint with the lowest `loss` passed to `save`.
      read_only: never modify the folder; safe while the run is still training.

    Raises:
      CheckpointError: the folder cannot be created, or (read_only) does not exist.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_best: bool = False, read_only: bool = False):
        if keep < 2:
            raise ValueError(
                f"keep={keep}: expected at least 2, so that a failed save leaves a good checkpoint"
            )
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such checkpoint folder; expected the folder of a training run"
            )
        newest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        policies = [newest, best] if keep_best else [newest]
        _silence_orbax_logging()
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=1,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_loss if keep_best else None,  # without it Orbax does not write the metric
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"cannot create {self.folder}: {error.strerror or error}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not is_alone():
            return  # closing would wait for the other processes, which may be gone
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise  # otherwise let the exception that is already propagating through

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first."""
        return saved_steps(self.folder)

    def save(
        self,
        step: int,
        variables: PyTree,
        opt_state: PyTree,
        meta: Mapping[str, Any],
        loss: float | None = None,
    ) -> None:
        """Start writing both trees and `meta` (JSON); the caller may donate the arrays right after the call.

        Raises:
          CheckpointError: this save or the previous one failed: disk full, no write permission, ...
        """
        self.wait()
        trees = {
            name: {key: _detached(leaf) for key, leaf in _flat(tree).items()}
            for name, tree in (("variables", variables), ("optimizer", opt_state))
        }
        meta = {**meta, "step": step, CHECKSUMS: {name: checksums(tree) for name, tree in trees.items()}}
        items = ocp.args.Composite(
            meta=ocp.args.JsonSave(meta),
            **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
        )
        self._guard(
            lambda: self._manager.save(step, args=items, metrics=None if loss is None else {"loss": loss})
        )

    def wait(self) -> None:
        """Block until the pending save is on disk.

        Raises:
          CheckpointError: the save failed; its partial files have been removed.
        """
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self._guard(self._manager.close)

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # Orbax and TensorStore report a full disk as ValueError, OSError, ...
            for path in self.folder.glob(TEMPORARY):
                shutil.rmtree(path, ignore_errors=True)
            raise CheckpointError(
                f"cannot save a checkpoint in {self.folder}: {_one_line(error)}; free disk space or fix permissions, "
                f"then start again to resume from step {max(self.steps(), default=0)}"
            ) from error

    def restore(
        self,
        variables: PyTree,
        opt_state: PyTree | None = None,
        step: int | None = None,
        check: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ) -> Restored:
        """Read one checkpoint and verify every checksum.

        Args:
          variables, opt_state: trees of arrays or ShapeDtypeStructs that give structure, shapes and shardings;
            without opt_state the optimizer state is not read.
          step: None means the newest.
          check: called with `meta` before any array is read; raises if the checkpoint is not the expected one.

        Raises:
          CheckpointError: no checkpoint (at this step), or it is damaged or belongs to another model.
        """
        steps = self.steps()
        if step is None and steps:
            step = steps[-1]
        if step is None or step not in steps:
            got = f"no step {step}" if steps else "no checkpoint"
            raise CheckpointError(
                f"{self.folder}: {got}; expected one of {steps or 'at least one finished save'}"
            )
        wanted = {"variables": variables} | ({} if opt_state is None else {"optimizer": opt_state})
        args = {name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in wanted.items()}
        meta = everywhere(partial(self._read, step, {"meta": ocp.args.JsonRestore()}))["meta"]
        check(meta)
        read = everywhere(partial(self._read, step, args))
        try:
            method = checksums if CHECKSUMS in meta else crc32s
            for name in wanted:
                found, expected = method(read[name]), meta[CHECKSUMS if CHECKSUMS in meta else "crc32"][name]
                wrong = sorted(key for key in found if found[key] != expected.get(key))
                if wrong:
                    raise ValueError(
                        f"checksum of {name} {', '.join(wrong)} differs from the one saved with it"
                    )
        except Exception as error:  # a damaged file can surface as nearly any exception
            raise CheckpointError(f"{self.folder / str(step)} cannot be used: {_one_line(error)}") from error
        trees = {
            name: jax.tree.unflatten(jax.tree.structure(tree), [read[name][key] for key in _flat(tree)])
            for name, tree in wanted.items()
        }
        return Restored(step, trees["variables"], trees.get("optimizer"), meta)

    def _read(self, step: int, args: Mapping[str, Any]) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # a damaged file can surface as nearly any exception
            raise CheckpointError(f"{self.folder / str(step)} cannot be used: {_one_line(error)}") from error

    def restore_latest_intact(
        self,
        variables: PyTree,
        opt_state: PyTree,
        check: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ) -> Restored | None:
        """The newest intact checkpoint, or None without any; damaged newer ones are logged and moved away.

        Exceptions from `check` (see `restore`) propagate: such a checkpoint is not damaged.

        Raises:
          CheckpointError: every checkpoint is damaged.
        """
        damaged = []
        while self.steps():
            try:
                return self.restore(variables, opt_state, check=check)
            except (CheckpointError, OtherProcessFailed) as error:
                step = self.steps()[-1]
                target = self.folder.parent / "damaged" / str(step)
                everywhere(partial(self._move, step, target), only_first=True)
                self._manager.reload()
                logger.warning("%s. Moved it to %s; trying the previous checkpoint.", error, target)
                damaged.append(step)
        if damaged:
            raise CheckpointError(
                f"{self.folder}: all checkpoints (steps {sorted(damaged)}) are damaged; they were moved to "
                f"{self.folder.parent / 'damaged'}. Start in an empty folder, or restore an intact copy"
            )
        return None

    def _move(self, step: int, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        (self.folder / str(step)).rename(target)


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


def _flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path, so that Orbax does not depend on optax's state classes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _detached(leaf: Any) -> jax.Array:
    """A copy on a CPU, where Orbax would write from the buffer that the next update reuses. From other devices Orbax
    copies before `save` returns."""
    array = jnp.asarray(leaf)
    return jnp.copy(array) if next(iter(array.devices())).platform == "cpu" else array


def _abstract(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device
        )

    return {key: describe(leaf) for key, leaf in _flat(tree).items()}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _silence_orbax_logging() -> None:
    """Orbax logs tracebacks of errors that it also raises; `_guard` and `restore` report those in one line."""
    absl = logging.getLogger("absl")
    if not any(isinstance(existing, _ExcludeOrbax) for existing in absl.filters):
        absl.addFilter(_ExcludeOrbax())


class _ExcludeOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname
