"""tpu_compile without a TPU compiler: parsing programs, sharding packed models, and the committed table."""

from __future__ import annotations

import json

import jax
import pytest
from jax.sharding import PartitionSpec as P

from bitnet_jax.training.sharding import MeshConfig, make_mesh
from experiments import tpu_compile


def test_the_table_matches_the_committed_results() -> None:
    results = json.loads(tpu_compile.RESULTS.read_text())
    assert list(results) == list(tpu_compile.CASES)
    assert tpu_compile.table(results) in (tpu_compile.STUDY / "README.md").read_text()


@pytest.fixture
def tiny() -> tpu_compile.Case:
    return tpu_compile.Case(
        what="decode", chips="", mesh=MeshConfig(tensor=2), preset="tiny", batch=2, length=8
    )


def test_packed_matrices_are_sharded_like_the_matrices_they_hold(tiny: tpu_compile.Case) -> None:
    mesh = make_mesh(tiny.mesh)
    with jax.set_mesh(mesh):
        step, (variables, tokens, cache) = tpu_compile.decode_step(tiny, mesh)
        text = step.lower(variables, tokens, cache).as_text()  # type: ignore[attr-defined]
    layer = variables["packed"]["layers_0"]
    specs = {
        name: layer[part][name]["weight"].codes.sharding.spec
        for part, name in (("attention", "q_proj"), ("attention", "o_proj"), ("mlp", "down_proj"))
    }
    assert specs["q_proj"] == P("tensor", "fsdp")
    assert specs["o_proj"] == specs["down_proj"] == P("fsdp", "tensor")
    assert variables["params"]["embed"]["embedding"].sharding.spec == P("tensor", "fsdp")
    assert cache.layers[0].k.sharding.spec == P("data", None, "tensor")
    assert "sharding" in text


def test_the_training_step_matches_the_case(tiny: tpu_compile.Case) -> None:
    mesh = make_mesh(tiny.mesh)
    with jax.set_mesh(mesh):
        step, arguments = tpu_compile.training_step(tiny, mesh)
        state, metrics = jax.eval_shape(step, *arguments)
    assert jax.tree.structure(state) == jax.tree.structure(arguments[0])
    assert state.params["layers_0-1"]["mlp"]["up_proj"]["weight"].shape == (2, 128, 64)
    assert metrics["statistics"].scale.shape == (2 * 7,)
