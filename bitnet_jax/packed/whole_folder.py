"""A folder that is written whole or not at all."""

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

YOUNG_SECONDS = 60.0  # an empty folder may belong to a writer that is about to lock it


@contextlib.contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """A new file whose bytes are on disk when the body is done."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the names inside a folder durable, as fsync does for the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raises StorageError unless `folder` can be made: the nearest folder above it that exists may be written to."""
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if not there.is_dir():
        raise StorageError(f"{folder} cannot be written (Not a directory: {there}); choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(
            f"{folder} cannot be written: {there} is read-only or belongs to another user; choose another folder"
        )


def clear_left_behind(folder: Path) -> None:
    """Removes what killed writers of `folder` left; gives back the old folder of one killed between two renames."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{12}}(\.old)?")
    try:
        found = [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]
    except OSError:
        return  # no such folder, or none of ours to tidy up
    begun = [path for path in found if path.suffix != ".old" and _abandoned(path)]
    for old in (path for path in found if path.suffix == ".old"):
        if old.with_suffix("") in begun or not old.with_suffix("").exists():
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    old.rename(folder)
    for path in begun:
        shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path) -> bool:
    """Nobody holds the lock of this folder, which its writer takes as soon as it has made it."""
    try:
        if time.time() - path.stat().st_mtime < YOUNG_SECONDS and not any(path.iterdir()):
            return False
        with _locked(path):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which dies with its process. Raises OSError: another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _check_room(folder: Path, nbytes: int) -> None:
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise StorageError(
            f"{folder} cannot be written: got {free:,} bytes free on its disk, expected {nbytes:,} at least; "
            "make room, or choose a folder on another disk"
        )


@contextlib.contextmanager
def whole_folder(folder: Path, nbytes: int, *, overwrite: bool) -> Iterator[Path]:
    """A hidden sibling to write into; it takes the name `folder` if the body succeeds and vanishes if not.

    On any failure what was begun is removed. Only a process killed outright leaves its hidden sibling
    `.<name>.<random>`; in the instant between the two renames of an overwrite the old folder is such a sibling
    too, `.<name>.<random>.old`. `clear_left_behind` tidies up after it.

    Args:
      nbytes: what will be written; too full a disk is refused before it is filled.
      overwrite: take the place of a folder that is there; else one that came to be meanwhile stays.

    Raises:
      StorageError: the disk has no room for nbytes, another process made the folder meanwhile, or the operating
        system refuses anything.
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
                        f"{folder} was made by another process meanwhile; choose another folder"
                    )
                folder.rename(old)
            temporary.rename(folder)
            renamed = True
        _sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(folder if renamed else temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)  # another process took the name between the two renames
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise StorageError(
                f"{folder} cannot be written ({error.strerror or error}); nothing was left behind; "
                "make room, or choose a folder you may write to"
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)
