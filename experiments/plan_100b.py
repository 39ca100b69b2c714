"""The plan for a 100B model: its update compiled for TPUs, memory and communication per chip, tokens, days.

    make plan-100b                             an environment with libtpu, then all cases (an hour on two cores)
    python -m experiments.plan_100b --only v5p-256-bitnet_b158      repeat these; requires libtpu
    python -m experiments.plan_100b --report                        only the page, from results.json

Compiled figures are those of XLA's TPU compiler for chips that were not available. Derived figures follow from these
and from published properties of the chips (CHIPS) and of other training programs (PUBLISHED). Nothing was run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from bitnet_jax.models import PRESETS
from bitnet_jax.training.hardware import BFLOAT16_PEAKS
from bitnet_jax.training.sharding import MeshConfig
from experiments import tpu_compile
from experiments.tpu_compile import Case

PLAN = Path(__file__).parent / "plans" / "100b"
RESULTS = PLAN / "results.json"
LENGTH = 4096
TOKENS = 2e12

TEMPLATE = """# Plan: a 100B model on TPUs

Written by `python -m experiments.plan_100b --report` from [results.json](results.json); `make plan-100b`
compiles everything again. **Nothing on this page was run.** *Compiled*: reported by XLA's TPU compiler,
which needs no chip. *Derived*: computed from compiled figures and published properties of the chips.
*Published*: measured by others, on other models.

The preset `100b`: {layers} layers, {hidden} wide, {ffn} inner, {weights} billion weights in matrices,
sequences of {length} tokens. An update is that of `bitnet-jax train` with `training.scan_layers` and
`model.remat`: loss, gradient, AdamW with float32 moments, statistics of the codes. Activations are
bfloat16.

## Compiled: memory

GiB per device; a TPU7x chip is two devices. *Arguments* are parameters and moments, *peak* is the most that
is in use at a time, *temporaries* what the compiler reserves for all but the arguments, gaps included.
*Memory* is that of the device. *Compile s* is wall time on a shared machine; 1,024 chips were paused meanwhile.

{compiled}

{missing} 1,024 chips of v6e are four pods of 256 with a slower network between them, which is not compiled
here.

## Compiled: communication of an update

Result bytes per device, an operation in a loop counted as often as the loop runs; at least 0.1 GB. `u8` and
`u32` are packed codes, `f32` gradients.

{communication}

{reading}

## Derived: tokens per chip that hide it

With C operations a second and W bytes a second into a chip, a product of t tokens hides the gather of its
weights, b bytes each, if 2 t / C >= b / W. An update does 8 operations per weight and token (forward,
forward again, two products of the backward pass), gathers twice, and reduces and scatters a float32
gradient: 8 t / C >= (2 b + 4) / W. W is that of all axes of the torus together, or of one. These are the
least bytes, not those of the programs above.

{hiding}

Packing takes the gathers out of the sum: what remains is the gradient. Reducing it in bfloat16 would halve
the rest; not tried.

## Derived from published figures: days for {tokens} T tokens

{flops} billion useful operations a token (6 per weight, and causal attention). The share of the peak is
what dense models reached elsewhere; that a model in few bits reaches it is an assumption.

{days}

## Chips without int8

TPU7x lists peaks for bfloat16 and fp8, none for int8. The path `product="float"` multiplies int8 codes and
ternary codes as bfloat16 and adds in float32. It gives the same integers: bfloat16 holds integers up to
256, each product is one of them, and every partial sum is an integer that float32 holds while 128 times the
number of inputs is at most 2^24, that is up to {exact} inputs. The widest product of this model has
{widest}. [The test](../../../tests/experiments/test_plan_100b.py) compares both ways at the bound.

Generated at {made_by}.
"""
READING = """\
No float of a quantized matrix is gathered: only packed codes travel, twice per update. Where one axis
of the mesh is the whole slice, the compiler writes the sums of gradients as all-reduces of whole
gradients, and on a torus of three axes the gathers of codes too (u32). Those move about twice the bytes
of a gather, or of a reduction that leaves each chip its part; whether it is slower cannot be told
without a chip. The 7B update on a mesh of two axes ([study](../../studies/tpu_compile/README.md)) has
gathers of u8 and rings."""


def _case(chips: str, recipe: str, **mesh: int) -> Case:
    sizes = MeshConfig(**mesh)
    return Case(
        what="train",
        preset="100b",
        chips=chips,
        mesh=sizes,
        recipe=recipe,
        length=LENGTH,
        batch=sizes.batch_parts,
    )


# One sequence for each part of the batch. A TPU7x chip is two devices. A v6e pod has 256 chips, so 1,024 of them are
# four pods joined by a slower network, which is not compiled here.
SLICES = {
    ("v5p", 256): ("v5p:4x8x8", {"fsdp": 256}),
    ("v5p", 1024): ("v5p:8x8x16", {"fsdp": 1024}),
    ("v6e", 256): ("v6e:16x16", {"fsdp": 256}),
    ("tpu7x", 256): ("tpu7x:4x8x8", {"fsdp": 512}),
    ("tpu7x", 1024): ("tpu7x:8x8x16", {"fsdp": 1024, "tensor": 2}),
}
CASES = {
    f"{chip}-{count}-{recipe}": _case(topology, recipe, **mesh)
    for recipe in ("bitnet_b158", "bitnet")
    for (chip, count), (topology, mesh) in SLICES.items()
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published properties of a chip: https://docs.cloud.google.com/tpu/docs/tpu7x, which compares all three."""

    flops: float  # peak a second, bfloat16
    memory: float  # GiB
    link: float  # bytes a second in one direction: half of the bidirectional interconnect bandwidth of a chip
    axes: int  # of the torus, which share it
    devices: int = 1  # that XLA sees


CHIPS = {
    "v5p": Chip(BFLOAT16_PEAKS["TPU v5"], 95, 600e9, 3),
    "v6e": Chip(BFLOAT16_PEAKS["TPU v6e"], 32, 400e9, 2),
    "tpu7x": Chip(2307e12, 192, 600e9, 3, devices=2),
}
# Share of the bfloat16 peak that dense models reached elsewhere, with its source. None of them trained in few bits.
PUBLISHED = {
    "v5p": (0.687, "MaxText, 128B on 128 chips: github.com/AI-Hypercomputer/maxtext, configs/v5p"),
    "v6e": (0.419, "GPT-3 175B on 256 chips: github.com/AI-Hypercomputer/tpu-recipes"),
    "tpu7x": (0.547, "Llama 3.1 405B on 256 chips: github.com/AI-Hypercomputer/tpu-recipes"),
}
GATHERED = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "ternary, packed": 1 / 4,
    "binary, packed": 1 / 8,
}  # bytes a weight
LARGEST_CODE, EXACT_FLOAT32 = 128, 2**24


def flops_per_token() -> float:
    """Useful operations: 6 per weight of a matrix, and causal attention, 6 layers * length * width."""
    config = PRESETS["100b"]
    weights = sum(n * k for n, k in config.linear_shapes().values())
    return 6 * weights + 6 * config.num_layers * LENGTH * config.hidden_size


def days(chip: str, chips: int) -> float:
    """To train on TOKENS at the published share of the peak."""
    share, _ = PUBLISHED[chip]
    return TOKENS * flops_per_token() / (chips * CHIPS[chip].flops * share) / 86_400


def tokens_to_hide(chip: Chip, gathered: float, axes: int) -> tuple[float, float]:
    """Tokens per chip from which products take longer than communication: of a forward pass, of an update.

    A weight costs 2 operations per token in the forward pass and 8 in an update that recomputes blocks; it is gathered
    once and twice, and its float32 gradient (4 bytes) is reduced and scattered once. Both pass every chip once.

    Args:
      gathered: bytes per weight.
      axes: of the torus that the collective uses.
    """
    operations_per_byte = chip.flops / (chip.link * axes / chip.axes)
    return operations_per_byte * gathered / 2, operations_per_byte * (2 * gathered + 4) / 8


def largest_exact_inputs() -> int:
    """Inputs of a product of int8 codes and ternary ones up to which every partial sum is exact in float32.

    bfloat16 holds all integers up to 256, and a product with -1, 0 or 1 is one of them; partial sums are integers of
    at most 128 times the number of inputs, and float32 holds all up to 2^24.
    """
    return EXACT_FLOAT32 // LARGEST_CODE


def _table(head: str, rows: list[tuple[Any, ...]]) -> str:
    columns = head.split(" | ")
    lines = [f"| {head} |", "|" + "|".join(["---"] + ["--:"] * (len(columns) - 1)) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def _compiled_rows(results: dict[str, dict[str, Any]]) -> list[tuple[Any, ...]]:
    rows = []
    for name, row in results.items():
        chip = CHIPS[row["chips"].split(":")[0]]
        mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        tokens = row["batch"] * row["length"]
        sizes = ["-"] * 3
        if memory := row.get("bytes_per_device"):
            sizes = [f"{memory[part] / 2**30:.1f}" for part in ("arguments", "temporaries", "peak")]
        of = f"{chip.memory / chip.devices:.0f}"
        rows.append((name, mesh, f"{tokens / 2**20:.0f}", row["status"], *sizes, of, row["compile_seconds"]))
    return rows


def _communication_rows(results: dict[str, dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            operation,
            kind,
            entry["count"],
            f"{entry['bytes'] / 1e9:.1f}",
            f"{entry['largest_bytes'] / 1e6:.0f}",
        )
        for name, row in results.items()
        for operation, kinds in sorted(row.get("collectives", {}).items())
        for kind, entry in sorted(kinds.items())
        if entry["bytes"] >= 1e8
    ]


def _hiding_rows() -> list[tuple[Any, ...]]:
    rows = []
    for name, chip in CHIPS.items():
        for kind, gathered in GATHERED.items():
            every, one = (tokens_to_hide(chip, gathered, axes) for axes in (chip.axes, 1))
            rows.append((f"{name}, {kind}", *(f"{tokens:,.0f}" for tokens in (*every, *one))))
    return rows


def page(results: dict[str, dict[str, Any]]) -> str:
    """The README of the plan, from results.json and the tables of this file."""
    config = PRESETS["100b"]
    weights = sum(n * k for n, k in config.linear_shapes().values())
    widest = max(k for _, k in config.linear_shapes().values())
    made_by = {
        "commit {commit}, jax {jax}, libtpu {libtpu}".format(**row["provenance"]) for row in results.values()
    }
    missing = [name for name in CASES if name not in results]
    times = [
        (
            f"{chip}, {chips:,} chips",
            f"{PUBLISHED[chip][0]:.1%}",
            f"{days(chip, chips):.0f}",
            PUBLISHED[chip][1],
        )
        for chip in CHIPS
        for chips in (256, 1024)
    ]
    return TEMPLATE.format(
        weights=f"{weights / 1e9:.1f}",
        layers=config.num_layers,
        hidden=f"{config.hidden_size:,}",
        ffn=f"{config.ffn_size:,}",
        length=f"{LENGTH:,}",
        compiled=_table(
            "case | mesh | Mi tokens | result | arguments | temporaries | peak | memory | compile s",
            _compiled_rows(results),
        ),
        missing=f"Not compiled yet: {', '.join(missing)}." if missing else "All cases are compiled.",
        reading=READING,
        communication=_table(
            "case | operation | type | count | GB | largest, MB", _communication_rows(results)
        ),
        hiding=_table("gathers | forward | update | forward, one axis | update, one axis", _hiding_rows()),
        days=_table("slice | share of peak | days | published for", times),
        tokens=f"{TOKENS / 1e12:.0f}",
        flops=f"{flops_per_token() / 1e9:,.0f}",
        exact=f"{largest_exact_inputs():,}",
        widest=f"{widest:,}",
        made_by="; ".join(sorted(made_by)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="compile these")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.report:
        tpu_compile.compile_for_tpus()
        for name in options.only:
            row = tpu_compile.compile_case(CASES[name])
            results = {
                key: row if key == name else results[key] for key in CASES if key == name or key in results
            }
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}: {row['status']} in {row['compile_seconds']} s", flush=True)
    (PLAN / "README.md").write_text(page(results))


if __name__ == "__main__":
    main()
