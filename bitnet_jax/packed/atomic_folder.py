"""Atomic folder writes: the folder is complete or absent."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bitnet_jax.packed.tensor_file import StorageError

GRACE_SECONDS = 60.0  # an empty folder younger than this may belong to a writer that is about to lock it


@contextlib.contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, fsynced when the body completes."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the directory entries of a folder durable, as fsync does for the contents of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raises StorageError unless `folder` can be created: its nearest existing parent must be writable."""
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise StorageError(f"{folder} cannot be written (Not a directory: {parent}); choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(
            f"{folder} cannot be written: {parent} is read-only or belongs to another user; choose another folder"
        )


def remove_stale(folder: Path) -> None:
    """Removes leftovers of killed writers of `folder`; restores the old folder if one was killed between renames."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{12}}(\.old)?")
    try:
        found = [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]
    except OSError:
        return  # missing or unreadable: nothing to clean up
    abandoned = [path for path in found if path.suffix != ".old" and _abandoned(path)]
    for old in (path for path in found if path.suffix == ".old"):
        if old.with_suffix("") in abandoned or not old.with_suffix("").exists():
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    old.rename(folder)
    for path in abandoned:
        shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path) -> bool:
    """Whether no process holds the lock of this folder, which its writer takes right after creating it."""
    try:
        if time.time() - path.stat().st_mtime < GRACE_SECONDS and not any(path.iterdir()):
            return False
        with _locked(path):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is released with the process. Raises OSError: another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _check_room(folder: Path, nbytes: int) -> None:
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise StorageError(
            f"{folder} cannot be written: got {free:,} bytes free on its disk, expected at least {nbytes:,}; "
            "free some space, or choose a folder on another disk"
        )


@contextlib.contextmanager
def atomic_folder(folder: Path, nbytes: int, *, overwrite: bool) -> Iterator[Path]:
    """A hidden sibling to write into; it is renamed to `folder` if the body succeeds and removed if it fails.

    Only a process killed outright leaves its hidden sibling `.<name>.<random>` and, if killed between the two renames
    of an overwrite, the old folder as `.<name>.<random>.old`. `remove_stale` cleans up after it.

    Args:
      nbytes: bytes to be written; checked against the free disk space first.
      overwrite: replace an existing folder; otherwise a folder created in the meantime is kept.

    Raises:
      StorageError: not enough disk space, another process created the folder in the meantime, or any operating
        system error.
    """
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}"
    old = temporary.with_name(f"{temporary.name}.old")
    made = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    renamed = False
    try:
        _check_room(folder, nbytes)
        temporary.mkdir(parents=True)
        with _locked(temporary):
            yield temporary
            _sync_folder(temporary)
            if folder.exists():
                if not overwrite:
                    raise StorageError(
                        f"{folder} was created by another process in the meantime; choose another folder"
                    )
                folder.rename(old)
            temporary.rename(folder)
            renamed = True
        _sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(folder if renamed else temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)  # if another process took the name between the two renames
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise StorageError(
                f"{folder} cannot be written ({error.strerror or error}); nothing was left behind; "
                "free some space, or choose a writable folder"
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)
