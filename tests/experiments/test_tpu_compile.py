"""tpu_compile without a TPU compiler: parsing programs, sharding packed models, and the committed table."""

from __future__ import annotations

import json

import jax
import pytest
from jax.sharding import PartitionSpec as P

from bitnet_jax.training.sharding import MeshConfig, make_mesh
from experiments import tpu_compile

HLO = """
  %all-gather.8 = bf16[8000,4096]{1,0:T(8,128)(2,1)} all-gather(%fusion.2), channel_id=1, metadata={op_name="x"}
  %all-reduce.7 = (f32[]{:T(128)}, f32[16,3]{1,0}) all-reduce(%abs_reduce_fusion.22, %fusion.1), channel_id=2
  %collective-permute-start.8 = (bf16[4,1,8]{2,0,1}, bf16[4,1,8]{2,0,1}, u32[]{:S(2)}) collective-permute-start(%c)
  %collective-permute-done.8 = bf16[4,1,8]{2,0,1} collective-permute-done(%collective-permute-start.8)
  %all-gather.9 = bf16[16]{0} all-gather(%p), metadata={op_name="jit(f)/all-reduce(y)"}
  %fusion.3 = s8[4]{0} fusion(%all-gather.9)
"""


def test_collectives_are_counted_by_operation_and_type() -> None:
    body = f"""
%scattered (a: f32[8]) -> f32[2] {{
  %all-reduce.1 = f32[8]{{0}} all-reduce(%a), channel_id=3
}}

%all-reduce-scatter.1 (a: f32[8]) -> f32[2] {{
  %all-reduce.2 = f32[8]{{0}} all-reduce(%a), channel_id=3
}}

%condition (p: (s32[], f32[8])) -> pred[] {{
  %constant.1 = s32[]{{:T(128)}} constant(72)
  ROOT %lt.1 = pred[] compare(%get-tuple-element.1, %constant.1), direction=LT
}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %all-gather.1 = u8[4,8]{{1,0}} all-gather(%p.1), dimensions={{1}}
  %fusion.1 = f32[2]{{0}} fusion(%p.2), kind=kCustom, calls=%all-reduce-scatter.1
}}

ENTRY %main (a: f32[8]) -> f32[8] {{{HLO}
  %while.1 = (s32[], f32[8]) while(%tuple.1), condition=%condition, body=%body
  ROOT %call.1 = f32[2] call(%x), to_apply=%scattered
}}
"""
    assert tpu_compile.collectives(body) == {
        "all-gather": {
            "bf16": {"count": 2, "bytes": 2 * (8000 * 4096 + 16), "largest_bytes": 8000 * 4096 * 2},
            "u8": {"count": 72, "bytes": 72 * 32, "largest_bytes": 32},
        },
        "all-reduce": {"f32": {"count": 3, "bytes": 4 * (1 + 16 * 3 + 8), "largest_bytes": 16 * 3 * 4}},
        "collective-permute": {"bf16": {"count": 1, "bytes": 64, "largest_bytes": 64}},
        "reduce-scatter": {"f32": {"count": 72, "bytes": 72 * 32, "largest_bytes": 32}},
    }
    with pytest.raises(ValueError, match="loop condition"):
        tpu_compile.collectives(body.replace("direction=LT", "direction=NE"))


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
