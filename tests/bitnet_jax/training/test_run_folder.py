"""The run folder: accepted files, rejected files, and what overwriting removes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_jax.training import RunConfig, RunError
from bitnet_jax.training.run_folder import MAX_JSON_BYTES, RunFolder, write_atomic

Config = Callable[..., RunConfig]


def trained(path: Path, config: RunConfig) -> RunFolder:
    """A folder with settings and a dummy checkpoint that is never read."""
    (path / "checkpoints" / "2").mkdir(parents=True)
    folder = RunFolder(path)
    folder.write_config(config)
    return folder


@pytest.mark.parametrize("name", ["config.json", "result.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'"' + b"x" * MAX_JSON_BYTES + b'"',
        b'{"model": {"hidden_size": NaN}}',
    ],
    ids=["cut", "list", "number", "binary", "deep list", "deep object", "huge", "no run"],
)
def test_damaged_files_are_one_line_errors(
    tmp_path: Path, run_config: Config, name: str, content: bytes
) -> None:
    folder = trained(tmp_path, run_config())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} cannot be read: ") as error:
        folder.read_tokenizer() if name == "tokenizer.json" else folder.result_under(run_config())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["config.json", "result.json", "tokenizer.json"])
def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path: Path, run_config: Config, name: str) -> None:
    folder = trained(tmp_path, run_config())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(RunError, match=f"{name} cannot be read: got a folder, pipe or device"):
        folder.read_tokenizer() if name == "tokenizer.json" else folder.result_under(run_config())


def test_a_folder_without_a_checkpoint_or_result_counts_as_new(tmp_path: Path, run_config: Config) -> None:
    folder = RunFolder(tmp_path)
    for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
        (tmp_path / name).write_text("anything")
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-3").mkdir(parents=True)
    assert folder.result_under(run_config()) is None


def test_a_folder_whose_checkpoints_are_all_set_aside_does_not_count_as_new(
    tmp_path: Path, run_config: Config
) -> None:
    folder = trained(tmp_path, run_config())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "damaged" / "2")
    with pytest.raises(RunError, match="no checkpoint to resume from .*damaged"):
        folder.result_under(run_config())
    with pytest.raises(RunError, match="other settings"):
        folder.result_under(run_config(seed=1))


def test_a_folder_of_other_runs_is_rejected(tmp_path: Path, run_config: Config) -> None:
    trained(tmp_path / "runs" / "first", run_config())
    (tmp_path / "runs" / "notes").mkdir()
    folder = RunFolder(tmp_path / "runs")
    with (
        pytest.raises(
            RunError, match=r"runs: got a folder with other runs \(first\), expected the folder of one run"
        ),
        folder.training(run_config()),
    ):
        pass
    assert not folder.config.exists()
    assert RunFolder(tmp_path / "runs" / "second").result_under(run_config()) is None
    trained(tmp_path / "runs", run_config())
    assert folder.result_under(run_config()) is None  # its own run is resumed, whatever lies beside the files


def test_overwriting_removes_the_files_of_a_run(tmp_path: Path, run_config: Config) -> None:
    folder = trained(tmp_path / "run", run_config())
    (tmp_path / "run" / "checkpoints" / "4.orbax-checkpoint-tmp-0").mkdir()
    for name in ("tokenizer.json", "metrics.jsonl", "result.json", "result.json.tmp", ".lock"):
        (tmp_path / "run" / name).touch()
    for name in ("damaged", "tensorboard"):
        (tmp_path / "run" / name).mkdir()
    with folder.training(run_config(seed=1), overwrite=True) as result:
        assert result is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    RunFolder(tmp_path / "nowhere").check_overwritable()


@pytest.mark.parametrize("other", ["thesis.tex", "model.safetensors", "checkpoints/mine.ckpt"])
def test_folders_with_other_files_are_not_overwritten(tmp_path: Path, run_config: Config, other: str) -> None:
    folder = trained(tmp_path / "run", run_config())
    (tmp_path / "run" / other).touch()
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(RunError, match=f"{other}, which no run writes"):
        folder.check_overwritable()
    with (
        pytest.raises(RunError, match=f"{other}, which no run writes"),
        folder.training(run_config(), overwrite=True),
    ):
        pass
    assert sorted((tmp_path / "run").rglob("*")) == sorted([*before, tmp_path / "run" / ".lock"])


def test_a_config_that_is_not_a_run_config_is_not_overwritten(tmp_path: Path) -> None:
    write_atomic(tmp_path / "config.json", '{"model_type": "llama"}')
    with pytest.raises(RunError, match=r"config.json cannot be read: section of config: got 'model_type'"):
        RunFolder(tmp_path).check_overwritable()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="which is not a folder"):
        RunFolder(tmp_path / "file").check_overwritable()
