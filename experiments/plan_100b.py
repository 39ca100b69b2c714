"""The plan for a 100B model: its update compiled for TPUs, memory and communication per chip, tokens, days.

    make plan-100b                             an environment with libtpu, then all cases (an hour on two cores)
    python -m experiments.plan_100b --only v5p-256-bitnet_b158      repeat these; requires libtpu
    python -m experiments.plan_100b --report                        only the page, from results.json

Compiled figures are those of XLA's TPU compiler for chips that were not available. Derived figures follow from these
and from published properties of the chips (CHIPS) and of other training programs (PUBLISHED). Nothing was run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bitnet_jax.training.sharding import MeshConfig
from experiments import tpu_compile
from experiments.tpu_compile import Case

PLAN = Path(__file__).parent / "plans" / "100b"
RESULTS = PLAN / "results.json"
LENGTH = 4096
TOKENS = 2e12


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


if __name__ == "__main__":
    main()
