"""The benchmark runs, measures what it documents, and writes the documented rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import FORMATS, bench, cpu, machine, processors, timing
from bitnet_kernels.shapes import SUITES

COLUMNS = {
    "op",
    "format",
    "m",
    "n",
    "k",
    "threads",
    "implementation",
    "isa",
    "microseconds",
    "microseconds_p10",
    "microseconds_p90",
    "weight_bytes",
    "gbytes_per_second",
    "read_ceiling_gbytes_per_second",
    "read_ceiling_loop",
    "ceiling_fraction",
    "gmacs_per_second",
    "dot_peak_gmacs_per_second",
    "peak_fraction",
    "speedup_vs_xla_float32",
    "speedup_vs_xla_bfloat16",
    "speedup_vs_xla_int8",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "rows.json"
    bench.main(["--suite", "smoke", "--working-set", "1", "--seconds", "0.001", "--json", str(path)])
    return json.loads(path.read_text())


@pytest.mark.extended
def test_it_writes_one_row_per_shape_and_format(results: dict[str, Any]) -> None:
    rows = results["rows"]
    assert [(row["op"], row["m"], row["format"]) for row in rows] == [
        *(("in_cache", 1, f) for f in FORMATS),
        ("custom_call", 1, "ternary2"),
        *([("fork_join", None, None)] if cpu.unavailable() is None else []),
        *(("packed_matmul", shape.m, f) for shape in SUITES["smoke"] for f in FORMATS),
    ]
    for row in rows:
        assert set(row) == COLUMNS
        took = row["microseconds"] / 1e6
        assert 0 <= row["microseconds_p10"] <= row["microseconds"] <= row["microseconds_p90"]
        if row["op"] == "fork_join":
            assert row["microseconds"] < 1e5  # even on a busy machine
            continue
        assert row["threads"] == (1 if row["op"] == "in_cache" else processors.threads())
        np.testing.assert_allclose(row["gmacs_per_second"], row["m"] * row["n"] * row["k"] / took / 1e9)
        np.testing.assert_allclose(row["gbytes_per_second"], row["weight_bytes"] / took / 1e9)
        ceiling, peak = row["read_ceiling_gbytes_per_second"], row["dot_peak_gmacs_per_second"]
        assert (ceiling is None) == (row["op"] != "packed_matmul" or cpu.unavailable() is not None)
        assert (row["read_ceiling_loop"] is None) == (ceiling is None)
        if ceiling is not None:
            np.testing.assert_allclose(row["ceiling_fraction"], row["gbytes_per_second"] / ceiling)
        if peak is not None:
            np.testing.assert_allclose(row["peak_fraction"], row["gmacs_per_second"] / peak)
        if cpu.unavailable() is None:
            assert (row["implementation"], row["isa"]) == ("cpu", cpu.isa())
        assert (row["speedup_vs_xla_float32"] is None) == (row["op"] != "packed_matmul")
        assert row["weight_bytes"] == -(-row["k"] // FORMATS[row["format"]].block_k) * 64 * row["n"] // 16


def test_each_operation_is_timed_and_reported_with_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The i-th operation takes i seconds: three XLA products, the formats, the limits; chains use a set once."""

    def counted(calls: dict[str, Any], budget: float, settle: bool) -> dict[str, timing.Spread]:
        assert settle
        return {name: timing.Spread(i, i, i) for i, name in enumerate(calls, start=1)}

    monkeypatch.setattr(bench, "interleaved", counted)
    rows = bench.bench_shape(SUITES["smoke"][0], np.ones(1 << 20, np.uint8), 1 << 20, 0)
    for i, row in enumerate(rows, start=4):
        links = bench.copies(row["weight_bytes"], 1 << 20)
        np.testing.assert_allclose(row["microseconds"], 1e6 * i / links)
        for j, name in enumerate(bench.XLA, start=1):
            links_of_xla = bench.copies(row["n"] * row["k"] * jnp.dtype(name).itemsize, 1 << 20)
            np.testing.assert_allclose(row[f"speedup_vs_xla_{name}"], (j / links_of_xla) / (i / links))
    if cpu.unavailable() is None:
        read = 4 + len(FORMATS)
        np.testing.assert_allclose(rows[0]["read_ceiling_gbytes_per_second"], (1 << 20) / read / 1e9)


@pytest.mark.extended
def test_the_summary_is_the_ratio_of_the_rows(results: dict[str, Any]) -> None:
    times = {
        (row["format"], row["m"]): row["microseconds"]
        for row in results["rows"]
        if row["op"] == "packed_matmul"
    }
    assert set(results["summary"]) == {f"binary_over_ternary2_m{shape.m}" for shape in SUITES["smoke"]}
    for shape in SUITES["smoke"]:
        ratio = times["ternary2", shape.m] / times["binary", shape.m]
        np.testing.assert_allclose(results["summary"][f"binary_over_ternary2_m{shape.m}"], ratio)


@pytest.mark.extended
def test_the_results_record_their_provenance(results: dict[str, Any]) -> None:
    told = results["provenance"]
    assert told["jax"] == jax.__version__
    assert told["threads"] == processors.threads()
    assert told["isas"] == list(cpu.available_isas())
    assert told["date"].endswith("+00:00")
    assert told["processor"]


@pytest.mark.extended
def test_a_row_is_printed_as_one_line_under_the_columns(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        words = bench.show(row).split()
        assert words[:5] == [str(row[name] or "-") for name in ("op", "format", "m", "n", "k")]
        assert len(words) == 16


def test_without_the_library_there_is_no_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    assert machine.read_all(np.ones(4096, np.uint8)) is None
    assert machine.dot_peak() is None
    assert machine.fork_join() is None


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ library is absent")
@pytest.mark.slow  # times products of 8 to 67 MB, on an otherwise idle machine
@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
def test_no_product_is_faster_than_the_read_ceiling() -> None:
    """A number above a limit means that the limit is wrong; 1.1 is the noise of two medians of one run."""
    data = np.ones(256 << 20, np.uint8)
    rows = bench.bench_shape(bench.Shape(1, 8192, 8192), data, 256 << 20, 0.5)
    assert {row["format"]: row["ceiling_fraction"] for row in rows if row["ceiling_fraction"] > 1.1} == {}


def test_the_ceiling_reads_all_of_its_memory_in_pieces() -> None:
    data = np.zeros(10 << 20, np.uint8)
    data[[0, 3 << 20, (5 << 20) - 1]] = 1, 2, 4  # of the first half
    data[[5 << 20, -1]] = 8, 16
    library, _ = cpu.load()
    # The xor of all words: each marked byte appears at a different position of a word.
    expected = [np.bitwise_xor.reduce(half.view(np.uint64)) for half in np.split(data, 2)]
    names = []
    for loop in range(library.bitnet_kernels_read_loops()):
        if (name := library.bitnet_kernels_read_loop_name(loop)) is None:
            continue
        names.append(name.decode())
        read = [
            library.bitnet_kernels_read(data.ctypes.data + half * (5 << 20), 5 << 20, loop) for half in (0, 1)
        ]
        assert read == expected, name
    assert len(set(names)) == len(names) >= 24
    halves, whole = machine.read_all(data, 5 << 20), machine.read_all(data)
    assert halves is not None
    assert whole is not None
    assert (halves.amount, whole.amount) == (5 << 20, 10 << 20)
    assert {halves.loop, whole.loop} <= set(names)


def test_operations_are_timed_round_robin_and_warm_up_rounds_are_not_counted() -> None:
    calls: list[tuple[str, int]] = []

    def thing(name: str, seconds: float) -> Any:
        def call(round: int) -> None:
            calls.append((name, round))
            time.sleep(0.2 if len(calls) <= 4 else seconds)

        return call

    took = timing.interleaved({"a": thing("a", 0.001), "b": thing("b", 0.01)}, 0.02)
    assert calls[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert calls[4:10] == [(name, round) for round in range(3) for name in "ab"]
    assert 0.001 <= took["a"].median < 0.1  # a sleep is never shorter, and the slow rounds are excluded
    assert took["b"].p10 >= 0.01


def test_a_chain_cycles_through_its_weights_and_each_product_depends_on_the_last() -> None:
    """The last y of a chain of 2 is that of its second weight, in this round and after a full cycle."""
    weights = [jnp.full((2, 3), value, jnp.float32) for value in range(3)]
    run = timing.chain(timing.dense, jnp.ones((1, 3)), weights, 2)
    assert [float(run(round)[0, 0]) for round in range(4)] == [3, 0, 3, 0]
    # A product depends on the last one through an x that is zeroed where y is pi; y = pi makes that visible.
    pi = timing.chain(lambda x, w: x[:, :1] * w, jnp.ones((1, 3)), [jnp.float32(np.pi), jnp.float32(1)], 2)
    assert float(pi(0)[0, 0]) == 0


def test_no_link_of_a_chain_recomputes_earlier_links() -> None:
    """XLA fuses what it can recompute. Then every link would cost more than the one before."""
    run = jax.jit(lambda x, weights: timing.chain(timing.dense, x, weights, 8)(0))
    program = run.lower(jnp.ones((8, 3)), [jnp.ones((5, 3))] * 8).compile().as_text()
    assert 0 < program.count(" select(") <= 8  # one per link
