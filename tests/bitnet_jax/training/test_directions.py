"""Muon against its formula in NumPy; averages stored in bfloat16; a run with both resumes to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax.training import RunConfig
from bitnet_jax.training.checkpoints import Checkpoints
from bitnet_jax.training.directions import LARGEST_BFLOAT16_DECAY, adam, muon, stored_in
from bitnet_jax.training.loop import train
from bitnet_jax.training.optimizers import OptimizerConfig, make_optimizer
from bitnet_jax.training.run_folder import RunFolder
from bitnet_jax.training.sharding import MeshConfig, make_mesh, state_shardings
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.task import Task

RNG = np.random.default_rng(0)
SHAPES = {"wide": (6, 16), "tall": (16, 6), "stacked": (3, 8, 12), "lm_head": (10, 6)}
SETTINGS = (0.9, 0.95, 1e-8)


def gradients_of(steps: int) -> list[dict[str, Any]]:
    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return RNG.standard_normal(shape).astype(np.float32)

    return [
        {name: {"weight": normal(shape)} for name, shape in SHAPES.items()}
        | {"embed": {"embedding": normal((7, 6))}, "norm": {"scale": normal((6,))}}
        for _ in range(steps)
    ]


def directions(transform: optax.GradientTransformation, gradients: list[Any]) -> Any:
    """The direction after the last gradient, and the state."""
    state, update = transform.init(jax.tree.map(jnp.zeros_like, gradients[0])), jax.jit(transform.update)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            direction, state = update(gradient, state)
    return direction, state


def newton_schulz(m: np.ndarray) -> np.ndarray:
    """Muon's quintic iteration on the matrix itself, without the transposition that saves work."""
    x = m / np.linalg.norm(m)
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x


def test_muon_orthogonalizes_nesterov_momentum_of_hidden_matrices_and_leaves_the_rest_to_adam() -> None:
    gradients = gradients_of(3)
    got, _ = directions(muon(*SETTINGS), gradients)
    by_adam, _ = directions(adam(*SETTINGS), gradients)
    for name, shape in SHAPES.items():
        if name == "lm_head":
            continue
        average = np.zeros(shape)
        for gradient in gradients:
            average = 0.95 * average + 0.05 * gradient[name]["weight"]
        nesterov = 0.95 * average / (1 - 0.95**4) + 0.05 * gradients[-1][name]["weight"] / (1 - 0.95**3)
        flat = nesterov.reshape(-1, *shape[-2:])
        expected = np.stack([0.2 * max(shape[-2:]) ** 0.5 * newton_schulz(m) for m in flat]).reshape(shape)
        np.testing.assert_allclose(got[name]["weight"], expected, rtol=1e-3, atol=1e-4, err_msg=name)
        rms = np.sqrt(np.mean(np.square(got[name]["weight"])))
        assert 0.1 < rms < 0.3, name  # singular values of the iteration are between 0.7 and 1.2
    for name, leaf in (("lm_head", "weight"), ("embed", "embedding"), ("norm", "scale")):
        assert np.array_equal(got[name][leaf], by_adam[name][leaf]), name


def test_muon_of_split_matrices_is_that_of_whole_ones() -> None:
    gradients = gradients_of(1)[0]
    whole, _ = directions(muon(*SETTINGS), [gradients])
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    placed = jax.device_put(gradients, state_shardings(mesh, gradients))
    assert placed["wide"]["weight"].addressable_shards[0].data.shape == (6, 8)
    with jax.set_mesh(mesh):
        split, _ = directions(muon(*SETTINGS), [placed])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, split)


def test_stored_averages_are_rounded_between_updates_only() -> None:
    gradients = gradients_of(2)
    exact, _ = directions(adam(*SETTINGS), gradients[:1])
    rounded, state = directions(stored_in(jnp.bfloat16, adam(*SETTINGS)), gradients[:1])
    jax.tree.map(np.testing.assert_array_equal, exact, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("bfloat16")}
    assert state.count.dtype == jnp.int32
    _, state = directions(stored_in(jnp.bfloat16, muon(*SETTINGS)), gradients)
    kept = {
        jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    assert {str(dtype) for path, dtype in kept.items() if "mu" in path or "nu" in path} >= {"bfloat16"}
    assert {str(dtype) for path, dtype in kept.items() if "ns_coeffs" in path} == {"float32"}


def test_the_largest_decay_in_bfloat16_is_the_largest_at_which_no_average_stands_still() -> None:
    values = jnp.arange(128, 256).astype(jnp.bfloat16)  # every significand

    def still(decay: float) -> int:
        return int(jnp.sum((np.float32(decay) * values.astype(jnp.float32)).astype(jnp.bfloat16) == values))

    assert still(LARGEST_BFLOAT16_DECAY) == 0 < still(LARGEST_BFLOAT16_DECAY + 1e-3)
    OptimizerConfig(moments="bfloat16", beta2=LARGEST_BFLOAT16_DECAY)
    with pytest.raises(ValueError, match=r"beta2: got 0\.999 with moments='bfloat16'.*at most 0\.9961"):
        OptimizerConfig(moments="bfloat16", beta2=0.999)


def test_a_moving_average_of_the_weights_is_that_of_the_weights_after_each_update() -> None:
    config = OptimizerConfig(schedule="constant", learning_rate=0.1, ema_decay=0.75)
    optimizer = make_optimizer(config, 4)
    state, expected = optimizer.init({"a": {"weight": jnp.zeros(2)}}), 0.0
    for step in range(1, 4):
        params = {"a": {"weight": jnp.full(2, float(step))}}
        state = optimizer.average(state, params)
        expected = 0.75 * expected + 0.25 * step
        np.testing.assert_allclose(
            optimizer.averaged(state)["a"]["weight"], np.full(2, expected / (1 - 0.75**step)), rtol=1e-6
        )
    assert make_optimizer(OptimizerConfig(), 4).averaged(()) is None


EVERYTHING = dict(name="muon", moments="bfloat16", ema_decay=0.5, base_width=8)


def test_a_run_with_every_setting_resumes_to_the_same_bits(
    toy: Task, tmp_path: Path, run_config: Callable[..., RunConfig], capsys: Any
) -> None:
    def bits(folder: str, stop: int | None = None) -> list[bytes]:
        config = run_config(training=dict(steps=6, checkpoint_every=3, eval_every=3), optimizer=EVERYTHING)
        run = RunFolder(tmp_path / folder)
        batches = toy.train_batch if stop is None else interrupted(stop)
        with run.training(config) as result:
            assert result is None
            train(toy._replace(train_batch=batches), config, run, progress=False)
        optimizer = make_optimizer(config.optimizer, 6)
        shapes = jax.eval_shape(lambda: TrainState.create(toy.init(jax.random.key(0)), optimizer))
        with Checkpoints(run.checkpoints, read_only=True) as checkpoints:
            restored = checkpoints.restore(shapes.variables, shapes.opt_state, step=6)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(restored.opt_state)} >= {"bfloat16", "float32"}
        return [
            np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((restored.variables, restored.opt_state))
        ]

    def interrupted(stop: int) -> Callable[[int], Any]:
        def batch(step: int) -> Any:
            if step == stop:
                raise KeyboardInterrupt
            return toy.train_batch(step)

        return batch

    whole = bits("whole")
    with pytest.raises(KeyboardInterrupt):
        bits("run", stop=4)
    assert bits("run") == whole
    result = RunFolder(tmp_path / "run").read_result()
    assert result is not None
    assert result["valid"]["ema_loss"] != result["valid"]["loss"]
    assert "ema_decay=0.5 averages the latents of 1 binary or ternary layers" in capsys.readouterr().err
