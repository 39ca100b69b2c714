"""Collectives of compiled programs: those that compilers write, and those of programs compiled here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bitnet_jax.training.collectives import collectives, received_bytes, totals
from bitnet_jax.training.sharding import MeshConfig, make_mesh

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
    assert totals(collectives(body)) == {
        "all-gather": {
            "bf16": {"count": 2, "bytes": 2 * (8000 * 4096 + 16), "largest_bytes": 8000 * 4096 * 2},
            "u8": {"count": 72, "bytes": 72 * 32, "largest_bytes": 32},
        },
        "all-reduce": {"f32": {"count": 3, "bytes": 4 * (1 + 16 * 3 + 8), "largest_bytes": 16 * 3 * 4}},
        "collective-permute": {"bf16": {"count": 1, "bytes": 64, "largest_bytes": 64}},
        "reduce-scatter": {"f32": {"count": 72, "bytes": 72 * 32, "largest_bytes": 32}},
    }
    with pytest.raises(ValueError, match="loop condition"):
        collectives(body.replace("direction=LT", "direction=NE"))
    counted = body.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert totals(collectives(counted))["all-gather"]["u8"]["count"] == 5


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", 8),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[2,4]T(1,0)", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
    ],
)
def test_received_bytes_follow_from_the_devices_of_a_group(groups: str, devices: int) -> None:
    lines = {
        "all-gather": "%a = f32[64]{0} all-gather(%x), replica_groups=GROUPS, dimensions={0}",
        "all-reduce": "%b = (f32[64]{0}, f8e4m3fn[32]{0}) all-reduce(%x, %y), replica_groups=GROUPS, to_apply=%sum",
        "reduce-scatter": "%c = f32[64]{0} reduce-scatter(%x), replica_groups=GROUPS, dimensions={0}",
        "all-to-all": "ROOT %d = (pred[64]{0}, pred[64]{0}) all-to-all(%x, %y), replica_groups=GROUPS",
    }
    body = "\n".join(f"  {line}" for line in lines.values()).replace("GROUPS", groups)
    text = f"HloModule jit_f, num_partitions=8\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    others = devices - 1
    assert received_bytes(collectives(text)) == {
        "all-gather": {"f32": 256 * others // devices},
        "all-reduce": {"f32": 2 * 256 * others // devices, "f8e4m3fn": 2 * 32 * others // devices},
        "all-to-all": {"pred": 128 * others // devices},
        "reduce-scatter": {"f32": 256 * others},
    }


def test_an_asynchronous_operation_is_counted_once_with_the_devices_of_its_start() -> None:
    text = """HloModule jit_f, num_partitions=8

ENTRY %main (a: f32[8]) -> f32[8] {
  %all-gather-start.1 = ((f32[2]{0}, s8[4]{0}), (f32[8]{0}, s8[16]{0})) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %all-gather-done.1 = (f32[8]{0}, s8[16]{0}) all-gather-done(%all-gather-start.1)
  %all-reduce-start.1 = f32[8]{0} all-reduce-start(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  ROOT %all-reduce-done.1 = f32[8]{0} all-reduce-done(f32[8]{0} %all-reduce-start.1)
}
"""
    assert received_bytes(collectives(text)) == {
        "all-gather": {"f32": 24, "s8": 12},
        "all-reduce": {"f32": 32},
    }


def test_a_program_compiled_here() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2))

    def program(x: jax.Array) -> jax.Array:
        whole = jax.lax.with_sharding_constraint(jnp.sin(x), P())
        return jax.lax.fori_loop(0, 3, lambda i, y: y + jnp.sum(x * i.astype(jnp.float32)), whole)

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp")))
        found = collectives(jax.jit(program).lower(x).compile().as_text())
    # half of x, and three times a sum: half of it twice
    assert received_bytes(found) == {"all-gather": {"f32": 8 * 4 * 4 // 2}, "all-reduce": {"f32": 3 * 4}}
