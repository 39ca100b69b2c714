"""The GPU kernel: interpreted by Pallas, lowered for an absent H200, and rejected where it cannot run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from bitnet_kernels import FORMATS, PackedArray, pack, packed_matmul, pallas_gpu, reference

# programs compiled for the local GPU would use XLA
pytestmark = pytest.mark.filterwarnings("ignore:packed_matmul runs on XLA")
GPU_FORMATS = [name for name, form in FORMATS.items() if pallas_gpu.LAYOUT in form.layouts]
new_jax = pytest.mark.skipif(
    jax.__version_info__ < pallas_gpu.OLDEST_JAX,
    reason=f"the GPU kernel needs a newer jax than {jax.__version__}",
)
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason=f"the interpreter of GPU kernels of jax {jax.__version__} is too old",
)


def interpreter(**options):
    """Parameters of the Pallas interpreter, which jax does not export yet."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**options)


def random_product(format: str, m: int, n: int, k: int, seed: int) -> tuple[jax.Array, PackedArray]:
    random = np.random.default_rng(seed)
    codes = random.choice(np.array(FORMATS[format].values, np.int8), (n, k))
    scale = random.uniform(0.1, 2.0, (n, 1)).astype(np.float32)
    x = random.integers(-128, 128, (m, k), np.int8)
    x[m // 2] = random.choice(np.array([-128, 127], np.int8), k)
    return jnp.asarray(x), pack(codes, scale, format, pallas_gpu.LAYOUT)


@interpreted
@settings(max_examples=12, deadline=None)  # every new shape compiles
@given(
    st.sampled_from(GPU_FORMATS),
    st.sampled_from([1, 3, 8, 9, 17, 33, 70]),
    st.integers(1, 300),
    st.integers(1, 2100),
    st.integers(0, 2**32 - 1),
)
def test_products_are_exact_for_any_shape(format: str, m: int, n: int, k: int, seed: int) -> None:
    x, w = random_product(format, m, n, k, seed)
    sums = pallas_gpu.integer_matmul(x, w, interpret=interpreter())
    assert sums.dtype == np.int32
    np.testing.assert_array_equal(sums, reference.integer_matmul(x, w))


@interpreted
@pytest.mark.parametrize("format", GPU_FORMATS)
def test_the_interpreter_detects_no_race(format: str) -> None:
    x, w = random_product(format, 9, 130, 1100, 0)
    y = pallas_gpu.scaled_matmul(x, w, interpret=interpreter(detect_races=True))
    np.testing.assert_array_equal(y, reference.scaled_matmul(x, w))


@new_jax
@pytest.mark.parametrize("format", GPU_FORMATS)
@pytest.mark.parametrize("m", [1, 16, 64, 500])
def test_packed_matmul_lowers_to_the_kernel_for_an_h200(format: str, m: int) -> None:
    text = lowered_for_h200(format, m)
    assert "mosaic_gpu_v2" in text


def test_the_kernel_is_not_used_for_an_unsupported_layout_or_jax_version() -> None:
    w = pack(jnp.ones((128, 512), jnp.int8), jnp.ones((128, 4)), "ternary2", pallas_gpu.LAYOUT)
    reason = pallas_gpu.obstacle(w)
    expected = "4 groups" if jax.__version_info__ >= pallas_gpu.OLDEST_JAX else "needs jax 0.11 or newer"
    assert expected in reason
    with pytest.raises(NotImplementedError, match=expected):
        packed_matmul(jnp.ones((1, 512)), w, implementation="gpu")


@pytest.mark.skipif(
    jax.__version_info__ >= pallas_gpu.OLDEST_JAX,
    reason="this jax has the kernel; the fallback is for older ones",
)
def test_an_older_jax_uses_xla_on_a_gpu() -> None:
    assert "mosaic" not in lowered_for_h200("ternary2", 8)


def lowered_for_h200(format: str, m: int) -> str:
    x, w = random_product(format, m, 640, 1536, 0)
    call = jax.jit(packed_matmul)
    if jax.__version_info__ < (0, 11):
        return call.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    from jax.sharding import AbstractDevice

    device = AbstractDevice("NVIDIA H200", pallas_gpu.MULTIPROCESSORS, "cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        return call.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
