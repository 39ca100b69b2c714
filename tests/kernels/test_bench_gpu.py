"""The GPU benchmark, run on any backend: it detects wrong products, and its figures are consistent."""

from __future__ import annotations

import jax
import pytest

from bitnet_kernels import bench, bench_gpu
from bitnet_kernels.shapes import Shape
from bitnet_kernels.timing import Spread

SMALL = Shape(2, 128, 512)


@pytest.mark.slow
def test_correct_products_pass_and_wrong_ones_are_counted(monkeypatch) -> None:
    assert [row["wrong"] for row in bench_gpu.check([SMALL])] == [0, 0]
    right = bench_gpu.packed_matmul

    def wrong(x: jax.Array, w) -> jax.Array:
        return right(x, w).at[1, 5].add(1)

    monkeypatch.setattr(bench_gpu, "packed_matmul", wrong)
    assert [row["wrong"] for row in bench_gpu.check([SMALL])] == [1, 1]
    monkeypatch.setattr(bench_gpu, "GPU_CHECKED", [SMALL])
    with pytest.raises(RuntimeError, match="nothing was timed"):
        bench_gpu.run("decode", 0.01)


def test_figures_are_consistent(monkeypatch) -> None:
    def interleaved(calls, budget, settle):
        for call in calls.values():
            call(0)
        return {(name, length): Spread(*[3.0 if length == "long" else 1.0] * 3) for name, length in calls}

    monkeypatch.setattr(bench_gpu, "interleaved", interleaved)
    measured = bench_gpu.limits(0.0, peak=Shape(128, 128, 128), copy_bytes=1 << 22)
    assert measured["copy"] == 2 * (1 << 22) / (2.0 / 8)
    assert measured["int8"] == 128**3 / (2.0 / 4)
    rows = bench_gpu.bench_shape(SMALL, measured, 0.0, cache_bytes=0)
    assert [row["format"] for row in rows] == list(bench_gpu.FORMATS)
    for row in rows:
        assert row["microseconds"] == 2e6 / (bench_gpu.FEWEST - 2)
        assert row["weight_bytes"] == (128 * 512 // 8 if row["format"] == "binary" else 128 * 512 // 4)
        rate = row["weight_bytes"] / row["microseconds"] * 1e6
        assert row["copy_fraction"] == pytest.approx(rate / measured["copy"])
        assert row["int8_peak_fraction"] == pytest.approx(
            2 * 128 * 512 / row["microseconds"] * 1e6 / measured["int8"]
        )


def test_without_a_gpu_the_command_says_so(capsys) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.main(["--device", "gpu"])
    assert "JAX runs on 'cpu'; install jax[cuda13]" in capsys.readouterr().err


def test_noise_larger_than_a_product_is_an_error(monkeypatch) -> None:
    same = {("copy", "short"): Spread(1.0, 1.0, 1.0), ("copy", "long"): Spread(1.0, 1.0, 1.0)}
    monkeypatch.setattr(bench_gpu, "interleaved", lambda *_, **__: same)
    with pytest.raises(RuntimeError, match=r"timing noise exceeds the signal \(copy\)"):
        bench_gpu._slopes({"copy": (print, print, 8)}, 0.0)
