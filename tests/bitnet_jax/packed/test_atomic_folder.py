"""A packed folder is written atomically, whatever fails or is killed meanwhile."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax.data.tokenizers import ByteTokenizer
from bitnet_jax.models import ModelConfig
from bitnet_jax.packed.atomic_folder import atomic_folder
from bitnet_jax.packed.storage import StorageError, load_packed, save_packed
from tests.bitnet_jax.packed.folders import (
    CONFIG,
    TOKENIZER,
    assert_same,
)


def test_variables_that_do_not_match_the_config_are_not_written(
    variables: dict[str, Any], tmp_path: Path
) -> None:
    other = ModelConfig.from_dict(CONFIG.to_dict() | {"precision": "bitnet"})
    with pytest.raises(StorageError, match="the variables: packed/layers_0/attention/o_proj/weight/codes"):
        save_packed(tmp_path / "model", variables, other)
    relabelled = jax.tree.map(lambda leaf: leaf, variables)
    mlp = relabelled["packed"]["layers_0"]["mlp"]
    weight = mlp["up_proj"]["weight"]
    mlp["up_proj"]["weight"] = dataclasses.replace(
        weight, codes=jnp.zeros_like(weight.codes), format="ternary2", shape=(40, 12)
    )
    with pytest.raises(StorageError, match="packed formats, layouts or shapes do not match the config"):
        save_packed(tmp_path / "model", relabelled, CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_config_that_json_changes_is_not_written(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = CONFIG.to_dict() | {"init_std": 0.5}
    monkeypatch.setattr(ModelConfig, "to_dict", lambda config: changed)
    with pytest.raises(StorageError, match="the config changes in a JSON round trip"):
        save_packed(tmp_path / "model", variables, CONFIG)
    assert not list(tmp_path.iterdir())


class Failing:
    """Stands in for os.fsync: works `calls` times, then fails."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self.calls, self.error, self.fsync = calls, error, os.fsync

    def __call__(self, descriptor: int) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        self.fsync(descriptor)


@pytest.mark.parametrize("calls", range(5))
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_at_any_point_leaves_no_files_behind_and_the_old_model_intact(
    variables: dict[str, Any],
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
    existing: bool,
) -> None:
    folder = tmp_path / "models" / "model"
    if existing:
        shutil.copytree(saved, folder)
    before = sorted(path for path in tmp_path.rglob("*"))
    changed = jax.tree.map(lambda leaf: leaf, variables)
    changed["params"]["final_norm"]["scale"] = jnp.ones(24)

    monkeypatch.setattr(os, "fsync", Failing(calls, OSError(errno.ENOSPC, "No space left on device")))
    # Three files and their folder are synced before the rename, the parent after it.
    with pytest.raises(
        StorageError, match=r"cannot be written \(No space left on device\); nothing was left"
    ):
        save_packed(folder, changed, CONFIG, TOKENIZER, overwrite=existing)
    monkeypatch.undo()
    assert sorted(path for path in tmp_path.rglob("*")) == before
    if existing:
        assert_same(load_packed(folder)[1], variables)


def test_an_interrupt_cleans_up_and_propagates(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", Failing(1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_packed(tmp_path / "model", variables, CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_file_size_limit_of_the_system_is_a_clear_error(variables: dict[str, Any], tmp_path: Path) -> None:
    """A real failure: the kernel rejects the write in the middle of the file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot be written \(File too large\)"):
            save_packed(tmp_path / "model", variables, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_insufficient_disk_space_is_an_error_before_anything_is_written(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(
        StorageError, match=r"got 10,000 bytes free on its disk, expected at least \d\d,\d{3}"
    ):
        save_packed(tmp_path / "deep" / "model", variables, CONFIG)
    assert not list(tmp_path.iterdir())


def test_unwritable_targets_are_rejected(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written .Not a directory"):
        save_packed(tmp_path / "file" / "model", variables, CONFIG)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, as on some test machines, is never denied access
    with pytest.raises(StorageError, match="cannot be written .Permission denied"):
        save_packed(tmp_path / "model", variables, CONFIG)


def test_overwriting_is_explicit_and_never_removes_other_files(variables: dict[str, Any], copy: Path) -> None:
    with pytest.raises(StorageError, match="exists; choose another folder or pass overwrite=True"):
        save_packed(copy, variables, CONFIG)
    save_packed(copy, variables, CONFIG, ByteTokenizer(), overwrite=True)
    tokenizer = load_packed(copy)[2]
    assert isinstance(tokenizer, ByteTokenizer)
    save_packed(copy, variables, CONFIG, overwrite=True)
    assert load_packed(copy)[2] is None
    assert [entry.name for entry in copy.parent.iterdir()] == [copy.name]

    (copy / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not a packed model and will not be overwritten"):
        save_packed(copy, variables, CONFIG, overwrite=True)
    assert (copy / "notes.txt").read_text() == "mine"
    link = copy.parent / "link"
    link.symlink_to(copy)
    with pytest.raises(StorageError, match="will not be overwritten"):
        save_packed(link, variables, CONFIG, overwrite=True)


def test_a_model_in_use_survives_being_overwritten(variables: dict[str, Any], copy: Path) -> None:
    _, loaded, *_ = load_packed(copy)
    changed = jax.tree.map(lambda leaf: leaf, variables)
    changed["params"]["final_norm"]["scale"] = jnp.ones(24)
    save_packed(copy, changed, CONFIG, overwrite=True)
    assert_same(loaded, variables)
    assert_same(load_packed(copy)[1], changed)


# Writers that were killed


def test_leftovers_of_killed_writers_are_removed_and_the_old_folder_restored(
    variables: dict[str, Any], copy: Path
) -> None:
    """As after kill -9 during writing, and between the two renames of an overwrite."""
    begun = copy.with_name(".copy.0123456789ab")
    begun.mkdir()
    (begun / "model.safetensors").write_bytes(b"half")
    copy.rename(copy.with_name(".copy.0123456789ab.old"))
    foreign = copy.with_name(".copy.notes")
    foreign.mkdir()
    with pytest.raises(StorageError, match="copy exists"):
        save_packed(copy, variables, CONFIG)
    assert_same(load_packed(copy, verify=True).variables, variables)
    assert {entry.name for entry in copy.parent.iterdir()} == {"copy", ".copy.notes"}


def test_a_running_writer_is_left_alone(copy: Path, variables: dict[str, Any]) -> None:
    with atomic_folder(copy, 0, overwrite=True) as temporary:
        (temporary / "model.safetensors").write_bytes(b"half")
        with pytest.raises(StorageError, match="copy exists"):
            save_packed(copy, variables, CONFIG)
        assert (temporary / "model.safetensors").exists()


def test_a_folder_created_meanwhile_by_another_process_is_kept(copy: Path, variables: dict[str, Any]) -> None:
    """Two packs to the same folder: the target did not exist when either began."""
    target = copy.with_name("target")

    def meanwhile(count: int) -> None:
        if not target.exists():
            shutil.copytree(copy, target)
            (target / "mine").touch()

    with pytest.raises(StorageError, match="target was created by another process in the meantime"):
        save_packed(target, variables, CONFIG, on_bytes=meanwhile)
    assert (target / "mine").exists()
    assert {entry.name for entry in copy.parent.iterdir()} == {"copy", "target"}


def test_a_target_taken_between_the_two_renames_leaves_no_files_behind(
    copy: Path, variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def taken(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if target.suffix == ".old":
            copy.mkdir()
            (copy / "theirs").touch()
        return renamed

    monkeypatch.setattr(Path, "rename", taken)
    with pytest.raises(StorageError, match="copy cannot be written"):
        save_packed(copy, variables, CONFIG, overwrite=True)
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
    assert [entry.name for entry in copy.iterdir()] == ["theirs"]
