"""The kernels of the local accelerator, if any, against the reference on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import FORMATS, choose_implementation, dequantize, for_platform, packed_matmul, reference

PLATFORM = jax.default_backend()
pytestmark = pytest.mark.skipif(PLATFORM == "cpu", reason="no GPU or TPU here")
SHAPES = ((1, 100, 130), (7, 640, 2560), (16, 300, 1000), (65, 129, 6912), (300, 512, 8192))


@pytest.fixture(params=[name for name, form in FORMATS.items() if len(form.layouts) > 1])
def product(request, make_packed):
    """(float x, packed matrix on the device, the reference's result on the host), for any (m, n, k, groups)."""

    def make(m: int, n: int, k: int, groups: int = 1):
        x = np.random.default_rng(0).normal(size=(m, k)).astype(np.float32)
        with jax.default_device(jax.devices("cpu")[0]):
            _, w = make_packed(request.param, n, k, groups)
            expected = np.asarray(packed_matmul(jnp.asarray(x), w, implementation="reference"))
        moved = for_platform(w)
        if choose_implementation(moved).name != PLATFORM:
            pytest.skip(choose_implementation(moved).reason)
        return jnp.asarray(x), moved, expected

    return make


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_are_exact(product, m: int, n: int, k: int) -> None:
    x, w, expected = product(m, n, k)
    y = packed_matmul(x, w, implementation=PLATFORM)
    # integer sums are exact; activation scales are divisions, whose rounding depends on the device
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    codes = jnp.asarray(np.random.default_rng(1).integers(-128, 128, x.shape, np.int8))
    one = type(w)(w.codes, jnp.ones((1, 1), jnp.float32), w.format, w.layout, w.shape)
    sums = packed_matmul(codes, one, implementation=PLATFORM)
    np.testing.assert_array_equal(sums, reference.integer_matmul(codes, w)[0].astype(jnp.float32))


@pytest.mark.parametrize("groups", [2, 10, 20])
def test_scale_groups(product, groups: int) -> None:
    x, w, expected = product(9, 640, 2560, groups)
    np.testing.assert_allclose(packed_matmul(x, w), expected, rtol=1e-5, atol=1e-4)


def test_vmap_scan_and_gradient(product) -> None:
    x, w, expected = product(8, 640, 2560)
    rows = x.reshape(4, 2, -1)
    y = jax.vmap(lambda x: packed_matmul(x, w))(rows)
    np.testing.assert_allclose(y.reshape(8, -1), expected, rtol=1e-6)
    _, y = jax.lax.scan(lambda none, x: (none, packed_matmul(x, w)), None, rows)
    np.testing.assert_allclose(y.reshape(8, -1), expected, rtol=1e-6)
    dx = jax.grad(lambda x: packed_matmul(x, w).sum())(x)
    np.testing.assert_allclose(dx, jnp.broadcast_to(dequantize(w).sum(0), x.shape), rtol=1e-2, atol=0.5)
