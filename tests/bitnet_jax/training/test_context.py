"""Sequences split over two devices: the updates of one device, and no device holds the whole of activations."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.models.stacked import equal_layers, stack, unstack
from bitnet_jax.nn import attention
from bitnet_jax.training import RunConfig, fit
from bitnet_jax.training import task as task_module
from bitnet_jax.training.collectives import collectives
from bitnet_jax.training.optimizers import OptimizerConfig, make_optimizer
from bitnet_jax.training.sharding import MeshConfig, batch_sharding, make_mesh, state_shardings
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.step import make_train_step
from bitnet_jax.training.task import init_variables, language_loss, model_loss

pytestmark = pytest.mark.extended

B, T, V, LEARNING_RATE = 2, 32, 24, 0.01
MODEL: dict[str, Any] = dict(
    vocab_size=V,
    hidden_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_size=28,
    max_length=T,
)
# The float32 sums of a gradient are added in another order; in few bits that may also round an activation to the
# neighbouring code, which changes the gradients of a token by about one percent (see on_eight_devices.py).
TOLERANCE = {"float32": 1e-4, "bitnet_b158": 1e-2}
OTHER: dict[str, dict[str, Any]] = {
    "decoder": dict(sliding_window=7, z_loss=1e-3, scan=True, remat=True, segments=True),
    "encoder": dict(causal=False, num_classes=3, position="learned"),
    "linear encoder": dict(causal=False, num_classes=3, attention="linear"),
}


def updated(
    recipe: str,
    mesh: MeshConfig,
    scan: bool = False,
    z_loss: float = 0.0,
    segments: bool = False,
    **model: Any,
) -> tuple[Any, dict[str, Any], str]:
    """Parameters and metrics after one update, and its program."""
    config = ModelConfig(**MODEL | model, precision=recipe)
    optimizer = make_optimizer(
        OptimizerConfig(schedule="constant", learning_rate=LEARNING_RATE, epsilon=1e-3), 4
    )

    def create(key: jax.Array) -> TrainState:
        variables = init_variables(config, key)
        return TrainState.create(stack(variables, equal_layers(config)) if scan else variables, optimizer)

    rng, devices = np.random.default_rng(0), make_mesh(mesh)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    batch: dict[str, np.ndarray] = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    if segments:
        batch["segments"] = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32)
    if config.num_classes:
        batch |= {"targets": tokens[:, 0] % 3, "mask": np.arange(T)[None] < np.array([[T], [T - 9]])}
    loss = model_loss if config.num_classes else language_loss
    shardings = state_shardings(devices, jax.eval_shape(create, jax.random.key(0)))
    update = make_train_step(
        loss(Transformer(config), z_loss),
        optimizer,
        total_steps=4,
        precisions=config.precisions(),
        shardings=shardings,
    )
    with jax.set_mesh(devices):
        state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
        placed = jax.device_put(batch, batch_sharding(devices))
        program: Any = update.lower(state, placed, jax.random.key(1)).compile()  # type: ignore[attr-defined]
        state, metrics = jax.block_until_ready(program(state, placed, jax.random.key(1)))
    return jax.device_get(unstack(state).params), jax.device_get(metrics), program.as_text()


def assert_same(recipe: str, one: tuple[Any, ...], split: tuple[Any, ...]) -> None:
    (ours, measured, _), (theirs, found, _) = one, split
    np.testing.assert_allclose(found["loss"], measured["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], measured["grad_norm"], rtol=1e-3)
    np.testing.assert_array_equal(found["statistics"].zero_fraction, measured["statistics"].zero_fraction)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=LEARNING_RATE * TOLERANCE[recipe]),
        ours,
        theirs,
    )


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("float32", "decoder"),
        ("bitnet_b158", "decoder"),
        ("bitnet_b158", "encoder"),
        ("float32", "linear encoder"),
    ],
)
def test_an_update_equals_that_of_one_device(recipe: str, kind: str) -> None:
    one = updated(recipe, MeshConfig(), **OTHER[kind])
    assert_same(recipe, one, updated(recipe, MeshConfig(context=2), **OTHER[kind]))


def arrays(program: str) -> list[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]+)\]", program)
    return [(kind, tuple(map(int, dims.split(",")))) for kind, dims in found]


def test_only_keys_and_values_are_gathered() -> None:
    _, _, program = updated("bitnet_b158", MeshConfig(context=2))
    gathered = [one for one in collectives(program) if one.operation == "all-gather"]
    assert {one.shape for one in gathered} == {(B, T, 2, 6)}
    assert sum(one.times for one in gathered) == 2 * MODEL["num_layers"]
    sizes = {int(np.prod(shape)) for _, shape in arrays(program)}
    scores, activations, inner = B * 4 * T * T, B * T * MODEL["hidden_size"], B * T * MODEL["ffn_size"]
    assert scores // 2 in sizes  # a device has half of the queries
    assert scores not in sizes
    whole = {(B * T, MODEL["hidden_size"]), (B, T, MODEL["hidden_size"]), (B, T, MODEL["ffn_size"])}
    assert not whole & {shape for _, shape in arrays(program)}
    assert {activations // 2, inner // 2} <= sizes


def test_pieces_are_cut_from_the_tokens_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    one = updated("bitnet_b158", MeshConfig())
    monkeypatch.setattr(attention, "MOST_SCORES", B * 4 * T * T // 8)
    monkeypatch.setitem(task_module.MOST_LOGITS, "cpu", B * T * V // 8)
    split = updated("bitnet_b158", MeshConfig(context=2))
    assert_same("bitnet_b158", one, split)
    gathered = [one for one in collectives(split[2]) if one.operation == "all-gather"]
    assert {one.shape for one in gathered} == {(B, T, 2, 6)}
    assert B * 4 * T * T // 2 not in {
        int(np.prod(shape)) for kind, shape in arrays(split[2]) if kind == "f32"
    }


def test_a_run_on_split_sequences_resumes_on_another_mesh(
    tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A tiny text about quantized numbers. " * 40)
    data = dict(source=str(text), split="tail", valid_fraction=0.3, length=8, batch_size=2)

    def run(folder: str, steps: int, **mesh: int) -> dict[str, Any]:
        config = run_config(
            data=data, optimizer=dict(schedule="constant"), training=dict(steps=steps), mesh=mesh
        )
        return fit(config, tmp_path / folder, progress=False)

    whole = run("whole", 4)
    half = run("moved", 2, context=2)
    moved = run("moved", 4, data=2)
    assert whole["record"]["received_bytes_per_update"] is None
    # keys and values of one layer and head size 4: half of 2 x [2, 8, 2, 4] floats, gathered once
    assert half["record"]["received_bytes_per_update"]["all-gather"] == {"f32": 2 * 2 * 8 * 2 * 4 * 4 // 2}
    assert set(moved["record"]["received_bytes_per_update"]) == {"all-reduce"}
    assert moved["config_hash"] == whole["config_hash"]
    assert moved["valid"]["loss"] == pytest.approx(whole["valid"]["loss"], rel=1e-3)
