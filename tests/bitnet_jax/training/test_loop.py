"""The training loop: results, resuming, divergence, signals, unusable folders."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.quantization.recipes import RECIPES
from bitnet_jax.training import CheckpointError, Interrupted, RunConfig, RunError, fit, load_run
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.loop import train
from bitnet_jax.training.metrics import read_metrics
from bitnet_jax.training.optimizers import make_optimizer
from bitnet_jax.training.run_folder import RunFolder
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.statistics import Statistics
from bitnet_jax.training.task import Task

Config = Callable[..., RunConfig]
BINARY = RECIPES["bitnet"]


def run(task: Task, config: RunConfig, path: Path, progress: bool = False) -> dict[str, Any]:
    folder = RunFolder(path)
    with folder.training(config) as result:
        return train(task, config, folder, progress) if result is None else result


def final_bits(task: Task, config: RunConfig, path: Path) -> list[bytes]:
    """Variables and optimizer state of the newest checkpoint."""
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    shapes = jax.eval_shape(lambda: TrainState.create(task.init(jax.random.key(0)), optimizer))
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(shapes.variables, shapes.opt_state)
    leaves = jax.tree.leaves((restored.variables, restored.opt_state))
    return [np.int32(restored.step).tobytes(), *(np.asarray(leaf).tobytes() for leaf in leaves)]


def rows(path: Path) -> list[dict[str, Any]]:
    """Metrics without the timing field."""
    found = list(read_metrics(path / "metrics.jsonl"))
    for row in found:
        row.pop("tokens_per_second", None)
    return found


def test_a_run_of_a_real_model_on_real_text(tmp_path: Path, run_config: Config, capfd: Any) -> None:
    (tmp_path / "text.txt").write_text("A tiny text about quantized numbers. " * 20)
    config = run_config(
        data=dict(source="text.txt", root=str(tmp_path), split="tail", valid_fraction=0.2),
        evaluation=dict(batches=2),
    )
    result = fit(config.to_dict(), tmp_path / "run")
    assert result["status"] == "finished"
    assert result["step"] == result["steps"] == 6
    assert result["tokens"] == 6 * 2 * 8
    # 148 held-out bytes and the end of the document are predicted; only the bytes count
    assert result["valid"]["bits_per_byte"] == pytest.approx(result["valid"]["loss"] / np.log(2) * 149 / 148)
    assert result["config_hash"] == config.hash()
    assert result["data"]["text.txt"]["valid_bytes"] == 148
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert re.search(r"^run: 6/6 step, loss \d", capfd.readouterr().err, re.M)  # the progress line

    found = rows(tmp_path / "run")
    assert [r["step"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in found if r["kind"] == "valid"] == [3, 6]
    assert all("flip_rate" in r for r in found if r["kind"] == "train")
    layers = [r["layers"] for r in found if "layers" in r]
    assert len(layers) == 3
    assert set(layers[0]["layers_0/mlp/down_proj"]) == {*Statistics._fields}

    loaded, model, params, tokenizer = load_run(tmp_path / "run")
    assert loaded == config
    assert (model.vocab_size, tokenizer.vocab_size, model.max_length) == (256, 256, 8)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == result["parameters"]
    _, _, earlier, _ = load_run(tmp_path / "run", step=4)
    assert not np.array_equal(earlier["embed"]["embedding"], params["embed"]["embedding"])

    assert fit(config, tmp_path / "run", progress=False) == result  # finished: nothing is trained again


def test_the_test_data_is_measured_once_after_the_last_update(tmp_path: Path, run_config: Config) -> None:
    """Even if the process ends between that and the writing of the result."""
    (tmp_path / "text.txt").write_text("".join(f"A tiny text about the number {i}. " for i in range(30)))
    data = dict(source="text.txt", root=str(tmp_path), split="tail", valid_fraction=0.2, test=True)
    config = run_config(data=data, evaluation=dict(batches=2))
    result = fit(config, tmp_path / "run", progress=False)
    found = [row for row in rows(tmp_path / "run") if row["kind"] == "test"]
    assert [row["step"] for row in found] == [6]
    assert result["test_loss"] == found[0]["loss"] != result["valid"]["loss"]
    assert {"test_bits_per_byte", "test_perplexity"} <= result.keys()
    assert "test" not in result
    (tmp_path / "run" / "result.json").unlink()
    again = fit(config, tmp_path / "run", progress=False)
    assert again["test_loss"] == result["test_loss"]


class Calls:
    """Wraps a train_batch: runs a callback before the batch of a given step is made."""

    def __init__(self, task: Task, step: int, action: Callable[[], None]):
        self.task, self.step, self.action = task, step, action

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        if step == self.step:
            self.action()
        return self.task.train_batch(step)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_current_update_and_resuming_is_bit_identical(
    toy: Task, tmp_path: Path, run_config: Config, number: int, code: int, capsys: Any
) -> None:
    config = run_config(training=dict(steps=9, checkpoint_every=4, eval_every=5, accumulate=2))
    run(toy, config, tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped = toy._replace(train_batch=Calls(toy, 5, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(Interrupted) as stop:
        run(stopped, config, tmp_path / "run")
    assert stop.value.code == code
    assert f"{signal.Signals(number).name}: saved step 6 of 9" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not (tmp_path / "run" / "result.json").exists()

    started = []
    resumed = toy._replace(train_batch=Calls(toy, 6, lambda: started.append(6)))
    result = run(resumed, config, tmp_path / "run")
    assert (result["status"], result["step"], started) == ("finished", 9, [6])
    assert final_bits(toy, config, tmp_path / "run") == final_bits(toy, config, tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_second_signal_is_immediate(toy: Task, tmp_path: Path, run_config: Config) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(toy._replace(train_batch=Calls(toy, 1, twice)), run_config(), tmp_path / "run")


def test_a_thread_other_than_the_main_one_can_train(toy: Task, tmp_path: Path, run_config: Config) -> None:
    """Python lets only the main thread handle signals; other threads train without signal handling."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, toy, run_config(), tmp_path).result()["status"] == "finished"


def test_a_signal_during_the_last_update_does_not_interrupt_the_run(
    toy: Task, tmp_path: Path, run_config: Config
) -> None:
    last = Calls(toy, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(toy._replace(train_batch=last), run_config(), tmp_path / "run")["status"] == "finished"


def with_weight(task: Task, at: int, weight: float) -> Task:
    def batch(step: int) -> dict[str, np.ndarray]:
        found = task.train_batch(step)
        return found | {"weights": np.full(found["targets"].shape, weight if step == at else 1.0, np.float32)}

    return task._replace(train_batch=batch)


@pytest.mark.parametrize("last", [3, 4])  # the update before a checkpoint, and one between checkpoints
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    toy: Task, tmp_path: Path, run_config: Config, last: int, capsys: Any
) -> None:
    config = run_config(training=dict(steps=9))
    result = run(with_weight(toy, last, np.nan), config, tmp_path)
    assert (result["status"], result["step"]) == ("diverged", last + 1)
    assert f"update {last + 1} gave loss nan" in result["message"]
    kept = 2 * (last // 2)
    assert f"the last good checkpoint is at step {kept}" in capsys.readouterr().err
    assert all(np.isfinite(np.frombuffer(b, np.float32)).all() for b in final_bits(toy, config, tmp_path)[2:])
    assert json.loads((tmp_path / "result.json").read_text())["train"]["loss"] == "nan"
    assert rows(tmp_path)[-1]["loss"] == "nan"
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == kept


def test_divergence_before_the_first_checkpoint_and_beyond_the_loss_limit(
    toy: Task, tmp_path: Path, run_config: Config, capsys: Any
) -> None:
    result = run(toy, run_config(training=dict(max_loss=0.1)), tmp_path)
    assert (result["status"], result["step"]) == ("diverged", 1)
    assert "a loss up to 0.1" in result["message"]
    assert "checkpoint is at step 0" in capsys.readouterr().err


def test_the_best_checkpoint_is_kept(toy: Task, tmp_path: Path, run_config: Config) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6])
    task = toy._replace(evaluate=lambda params: {"loss": next(losses)})
    config = run_config(training=dict(steps=5, eval_every=1, checkpoint_every=1, keep_best=True))
    assert run(task, config, tmp_path)["valid"] == {"loss": 2.6}
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]


@pytest.mark.usefixtures("orbax_litter")
def test_resuming_past_a_damaged_newest_checkpoint_is_bit_identical(
    toy: Task, tmp_path: Path, run_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config()
    run(toy, config, tmp_path / "whole")
    run(toy, config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoints" / "6" / "meta" / "metadata").write_text("damaged")
    run(toy, config, tmp_path / "run")
    assert "trying the previous checkpoint" in caplog.text
    assert final_bits(toy, config, tmp_path / "run") == final_bits(toy, config, tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_another_config_or_another_text_is_rejected(toy: Task, tmp_path: Path, run_config: Config) -> None:
    run(toy, run_config(), tmp_path)
    with pytest.raises(RunError, match=r"other settings \(optimizer.beta2: 0.95, 0.9; saved, then given\)"):
        run(toy, run_config(optimizer=dict(beta2=0.9)), tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(RunError, match="the data this run began with"):
        run(toy._replace(fingerprint=2), run_config(), tmp_path)


def test_unusable_folders_are_rejected(toy: Task, tmp_path: Path, run_config: Config) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot create the run folder .*: Not a directory"):
        run(toy, run_config(), tmp_path / "file" / "run")

    (tmp_path / "odd" / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(RunError, match="checkpoints without config.json"):
        run(toy, run_config(), tmp_path / "odd")

    (tmp_path / "damaged" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "damaged" / "config.json").write_text('{"model": ')
    with pytest.raises(RunError, match="config.json cannot be read"):
        run(toy, run_config(), tmp_path / "damaged")

    (tmp_path / "busy").mkdir()
    with (tmp_path / "busy" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is training in it"):
            run(toy, run_config(), tmp_path / "busy")


def test_a_start_that_fails_on_its_data_leaves_no_files_behind(tmp_path: Path, run_config: Config) -> None:
    wrong = run_config(data=dict(source=str(tmp_path / "nowhere.txt")))
    with pytest.raises(ValueError, match="nowhere"):
        fit(wrong, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_may_be_restarted_with_other_settings(
    toy: Task, tmp_path: Path, run_config: Config
) -> None:
    """Killed, out of memory, invalid batch: its files do not constrain the next start."""

    def fail() -> None:
        raise ValueError("a batch that cannot be made")

    with pytest.raises(ValueError, match="cannot be made"):
        run(toy._replace(train_batch=Calls(toy, 1, fail)), run_config(optimizer=dict(beta2=0.9)), tmp_path)
    assert (tmp_path / "config.json").exists()
    (tmp_path / "tokenizer.json").write_text('{"kind": "char", "characters": "ab"}')  # on another text
    config = run_config()
    assert run(toy, config, tmp_path)["status"] == "finished"
    folder = RunFolder(tmp_path)
    assert folder.read_config() == config
    assert folder.read_tokenizer().vocab_size == 256
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def constant(run_config: Config, steps: int, **training: int) -> RunConfig:
    return run_config(optimizer=dict(schedule="constant"), training=dict(steps=steps) | training)


@pytest.mark.extended(after=1)
@pytest.mark.parametrize("interrupted", [False, True])
def test_an_extended_run_with_a_constant_schedule_is_bit_identical_to_the_longer_run(
    toy: Task, tmp_path: Path, run_config: Config, capsys: Any, interrupted: bool
) -> None:
    first, last = constant(run_config, 6), constant(run_config, 12)
    whole = run(toy, last, tmp_path / "whole")
    if interrupted:
        stopped = toy._replace(train_batch=Calls(toy, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Interrupted):
            run(stopped, first, tmp_path / "run")
    else:
        run(toy, first, tmp_path / "run")
    capsys.readouterr()
    result = run(toy, last, tmp_path / "run")
    step = 4 if interrupted else 6
    told = f"training.steps: 6 before, 12 now; resuming from step {step}, bit-identical to a run started with 12\n"
    assert capsys.readouterr().err == told
    assert final_bits(toy, last, tmp_path / "run") == final_bits(toy, last, tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert (result["status"], result["step"], result["extended_from"]) == ("finished", 12, [6])
    assert "extended_from" not in whole
    assert json.loads((tmp_path / "run" / "config.json").read_text())["extended_from"] == [6]
    assert RunFolder(tmp_path / "run").read_config() == last
    assert run(toy, last, tmp_path / "run") == result  # finished: nothing is trained, nothing is printed
    assert capsys.readouterr().err == ""


def test_extending_a_run_reports_what_depends_on_the_new_total(
    toy: Task, tmp_path: Path, run_config: Config, capsys: Any
) -> None:
    until = dict(schedule="linear", weight_decay_until=0.5)
    annealed = toy._replace(precisions={"out": dataclasses.replace(BINARY, weight_ste="tanh")})
    run(annealed, run_config(optimizer=until, training=dict(steps=4)), tmp_path)
    capsys.readouterr()
    for steps, before in ((6, [4]), (8, [4, 6])):
        config = run_config(optimizer=until, training=dict(steps=steps))
        assert run(annealed, config, tmp_path)["extended_from"] == before
    assert capsys.readouterr().err.splitlines() == [
        f"training.steps: {before} before, {steps} now; resuming from step {before}, with schedule='linear', "
        f"weight_decay_until=0.5, the gradient 'tanh' computed for {steps} from here on; differs from a run started "
        f"with {steps}"
        for before, steps in ((4, 6), (6, 8))
    ]
    rates = [row["learning_rate"] for row in rows(tmp_path) if row["kind"] == "train"]
    assert rates[3] < rates[4]  # 1 - 3/4 with a total of 4 steps, then 1 - 4/6
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "train"] == list(range(1, 9))


def test_a_killed_extension_can_be_resumed(toy: Task, tmp_path: Path, run_config: Config) -> None:
    run(toy, constant(run_config, 4), tmp_path)
    longer = constant(run_config, 9)
    stopped = toy._replace(train_batch=Calls(toy, 6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Interrupted):
        run(stopped, longer, tmp_path)
    assert not (tmp_path / "result.json").exists(), "it is no longer finished"
    assert run(toy, longer, tmp_path)["extended_from"] == [4]


def test_fewer_steps_than_trained_are_rejected_and_others_shorten_the_run(
    toy: Task, tmp_path: Path, run_config: Config
) -> None:
    stopped = toy._replace(train_batch=Calls(toy, 6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Interrupted):
        run(stopped, constant(run_config, 12), tmp_path)
    with pytest.raises(
        RunError, match=r"training.steps: got 5, expected at least the 7 that the run in .* has"
    ):
        run(toy, constant(run_config, 5), tmp_path)
    result = run(toy, constant(run_config, 7), tmp_path)
    assert (result["step"], result["steps"], result["extended_from"]) == (7, 7, [12])
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "valid"] == [3, 6, 7]
    with pytest.raises(RunError, match="got 6, expected at least the 7"):
        run(toy, constant(run_config, 6), tmp_path)


def test_evaluation_and_checkpoint_intervals_may_change(
    toy: Task, tmp_path: Path, run_config: Config
) -> None:
    config = constant(run_config, 12)
    run(toy, config, tmp_path / "whole")
    stopped = toy._replace(train_batch=Calls(toy, 4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Interrupted):
        run(stopped, config, tmp_path / "run")
    other = constant(run_config, 12, log_every=5, eval_every=4, checkpoint_every=3, keep_checkpoints=4)
    result = run(toy, other, tmp_path / "run")
    assert "extended_from" not in result
    assert RunFolder(tmp_path / "run").read_config() == other
    assert final_bits(toy, config, tmp_path / "run") == final_bits(toy, config, tmp_path / "whole")


def test_a_diverged_run_cannot_be_extended(toy: Task, tmp_path: Path, run_config: Config) -> None:
    bad = with_weight(toy, 3, np.nan)
    assert run(bad, run_config(), tmp_path)["status"] == "diverged"
    assert run(bad, run_config(), tmp_path) == json.loads((tmp_path / "result.json").read_text())
    with pytest.raises(RunError, match=r"got 9, but the run in .* diverged at step 4 and cannot be resumed"):
        run(bad, run_config(training=dict(steps=9)), tmp_path)


def test_overwriting_starts_from_scratch(toy: Task, tmp_path: Path, run_config: Config) -> None:
    run(toy, run_config(), tmp_path / "run")
    other = run_config(optimizer=dict(beta2=0.9), training=dict(steps=4))

    def toy_task(config: RunConfig) -> Task:
        return toy

    with pytest.raises(RunError, match="other settings .*beta2: 0.95, 0.9; saved, then given"):
        fit(other, tmp_path / "run", False, task=toy_task)
    assert fit(other, tmp_path / "run", False, task=toy_task, overwrite=True)["step"] == 4
    run(toy, other, tmp_path / "whole")
    assert final_bits(toy, other, tmp_path / "run") == final_bits(toy, other, tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")

    def no_data(config: RunConfig) -> Task:
        raise ValueError("no such data")

    with pytest.raises(ValueError, match="no such data"):
        fit(run_config(), tmp_path / "run", False, task=no_data, overwrite=True)
    assert RunFolder(tmp_path / "run").read_config() == other, "what cannot be replaced is kept"


def test_unreadable_runs_are_errors(toy: Task, tmp_path: Path, run_config: Config) -> None:
    with pytest.raises(RunError, match=r"no config.json, expected the folder of a training run"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(run_config().to_json())
    with pytest.raises(RunError, match=r"tokenizer.json cannot be read"):
        load_run(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "byte"}')
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_run(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result.json cannot be read: .*; remove it"):
        fit(run_config(), tmp_path)


def test_a_failing_disk_is_a_one_line_error(
    toy: Task, tmp_path: Path, run_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitnet_jax.training.metrics.MetricsLog.flush", full)
    with pytest.raises(
        RunError, match="cannot write in .*: No space left on device; free disk space"
    ) as error:
        run(toy, run_config(), tmp_path / "a")
    assert "\n" not in str(error.value)

    monkeypatch.setattr(os, "replace", lambda *paths: full(None))
    with pytest.raises(RunError, match=r"cannot write .*tokenizer.json: No space left"):
        run(toy, run_config(), tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".lock"]
