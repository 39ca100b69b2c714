"""RMSNorm: against the formula in float64, independence of other rows, transformations, gradients, special values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import cpu, reference_rms_norm, rms_norm
from bitnet_kernels.processors import threads

EPS = 1e-5
here = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}")
IMPLEMENTATIONS = [pytest.param("cpu", marks=here), "reference"]


def operands(m: int, k: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(k)
    return jnp.asarray(rng.normal(size=(m, k)), jnp.float32), jnp.asarray(rng.normal(size=k), jnp.float32)


def formula(x: jax.Array, gain: jax.Array) -> np.ndarray:
    x64 = np.asarray(x, np.float64)
    return x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + EPS) * np.asarray(gain, np.float64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 7), (2, 16), (5, 100), (40, 1000), (1, 6912)])
def test_it_is_the_formula_within_the_stated_error(m: int, k: int, implementation: str) -> None:
    x, gain = operands(m, k)
    y = rms_norm(x, gain, eps=EPS, implementation=implementation)
    bound = (k / 16 + 8 if implementation == "cpu" else k + 4) * 2.0**-24
    np.testing.assert_allclose(y, formula(x, gain), rtol=bound)
    np.testing.assert_array_equal(
        rms_norm(x, eps=EPS, implementation=implementation) * gain[None], y, err_msg="without a gain"
    )


@here
def test_a_row_does_not_depend_on_other_rows_or_threads() -> None:
    x, gain = operands(67, 1000)  # enough elements for several threads
    together = rms_norm(x, gain, eps=EPS, implementation="cpu")
    alone = [rms_norm(row[None], gain, eps=EPS, implementation="cpu")[0] for row in x]
    np.testing.assert_array_equal(together, np.stack(alone))
    cpu.set_thread_count(1)
    try:
        one_thread = np.asarray(rms_norm(x, gain, eps=EPS, implementation="cpu"))
    finally:
        cpu.set_thread_count(threads())
    np.testing.assert_array_equal(together, one_thread)


@here
def test_it_works_under_transformations() -> None:
    x, gain = operands(6, 40)
    expected = rms_norm(x, gain, eps=EPS)
    np.testing.assert_array_equal(jax.jit(lambda x: rms_norm(x, gain, eps=EPS))(x), expected)
    np.testing.assert_array_equal(jax.vmap(lambda x: rms_norm(x, gain, eps=EPS))(x), expected)
    np.testing.assert_array_equal(rms_norm(x.reshape(2, 3, 40), gain, eps=EPS).reshape(6, 40), expected)
    gains = jnp.stack([gain, 2 * gain])
    both = jax.vmap(lambda gain: rms_norm(x, gain, eps=EPS))(gains)
    np.testing.assert_array_equal(both[0], expected)
    assert rms_norm(x[:0], gain, eps=EPS).shape == (0, 40)


def test_under_differentiation_it_is_the_reference() -> None:
    x, gain = operands(4, 40)

    def loss(norm):  # type: ignore[no-untyped-def]
        return lambda x, gain: jnp.sum(jnp.sin(norm(x, gain, eps=EPS)))

    got = jax.value_and_grad(loss(rms_norm), (0, 1))(x, gain)
    expected = jax.value_and_grad(loss(reference_rms_norm), (0, 1))(x, gain)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_gain_follows_the_cast_to_a_narrow_type(dtype: str, implementation: str) -> None:
    x, gain = operands(3, 48)
    y = rms_norm(x.astype(dtype), gain, eps=EPS, implementation=implementation)
    assert y.dtype == dtype
    plain = rms_norm(x.astype(dtype), eps=EPS, implementation=implementation)
    np.testing.assert_array_equal(y, plain * gain.astype(dtype)[None])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_element_is_seen_in_its_row_alone(value: float, implementation: str) -> None:
    x, gain = operands(3, 33)
    y = np.asarray(rms_norm(x.at[1, 5].set(value), gain, eps=EPS, implementation=implementation))
    expected = np.asarray(rms_norm(x, gain, eps=EPS, implementation=implementation))
    np.testing.assert_array_equal(y[[0, 2]], expected[[0, 2]])
    assert np.isnan(y[1, 5])
    # The mean is infinite, or NaN: all else becomes 0, or NaN.
    others = np.delete(y[1], 5)
    assert np.isnan(others).all() if np.isnan(value) else (others == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zeros_stay_zeros(implementation: str) -> None:
    y = rms_norm(jnp.zeros((2, 20)), jnp.ones(20), eps=EPS, implementation=implementation)
    np.testing.assert_array_equal(y, np.zeros((2, 20)))


def test_wrong_arguments_are_refused() -> None:
    x, gain = operands(2, 8)
    with pytest.raises(ValueError, match=r"gain has shape \(7,\); expected \(8,\)"):
        rms_norm(x, gain[:7], eps=EPS)
    with pytest.raises(ValueError, match=r"x is int32; expected float32"):
        rms_norm(jnp.ones((2, 8), jnp.int32), eps=EPS)
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        rms_norm(jnp.float32(1), eps=EPS)
    with pytest.raises(ValueError, match="implementation='gpu'"):
        rms_norm(x, eps=EPS, implementation="gpu")
