"""softmax_attention: forward and gradient against the definition in float64, and the kernels against each other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_kernels import cached_attention, cpu, softmax_attention
from bitnet_kernels.processors import threads

needs_library = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no C++ kernels: {cpu.unavailable()}"
)
SHAPES = [  # B, T, S, H, K, h
    (2, 7, 7, 2, 1, 8),
    (1, 100, 100, 4, 2, 32),
    (2, 65, 130, 3, 3, 20),
    (1, 50, 51, 2, 2, 300),
    (1, 129, 129, 1, 1, 33),
]
MASKS = ("causal", "random", "window", "all")


def problem(shape: tuple[int, ...], mask: str, seed: int = 0) -> tuple[jax.Array, ...]:
    """q, k, v, visible and the gradient of the result."""
    B, T, S, H, K, h = shape
    rng = np.random.default_rng(seed)
    sizes = ((B, T, H, h), (B, S, K, h), (B, S, K, h), (B, T, H, h))
    q, k, v, g = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes)
    distance = np.arange(T)[:, None] + (S - T) - np.arange(S)
    visible = {
        "causal": distance >= 0,
        "window": (distance >= 0) & (distance < 5),
        "random": rng.random((B, T, S)) < 0.3,
        "all": np.ones((T, S), bool),
    }[mask]
    visible = np.broadcast_to(visible, (B, T, S)).copy()
    if mask == "random":
        visible[:, 0] = False
    return q, k, v, jnp.asarray(visible), g


def run(arrays: tuple[jax.Array, ...], implementation: str | None) -> list[np.ndarray]:
    """The result and the gradients of q, k and v."""
    q, k, v, visible, g = arrays

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return softmax_attention(q, k, v, visible, q.shape[-1] ** -0.5, implementation=implementation)

    y, pullback = jax.vjp(attend, q, k, v)
    return [np.asarray(x) for x in (y, *pullback(g))]


def in_float64(arrays: tuple[jax.Array, ...]) -> list[np.ndarray]:
    q, k, v, visible, g = (np.asarray(x, np.float64) for x in arrays)
    scale, group = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    keys, values = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    seen = visible[:, None].astype(bool)
    scores = np.where(seen, np.einsum("bthd,bshd->bhts", q, keys) * scale, -np.inf)
    p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30)), 0)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    dp = np.einsum("bthd,bshd->bhts", g, values)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dk, dv = np.einsum("bhts,bthd->bshd", ds, q), np.einsum("bhts,bthd->bshd", p, g)
    of_kv_heads = (*k.shape[:3], group, k.shape[3])
    return [
        np.einsum("bhts,bshd->bthd", p, values),
        np.einsum("bhts,bshd->bthd", ds, keys),
        *(x.reshape(*of_kv_heads[:2], -1, group, of_kv_heads[4]).sum(3) for x in (dk, dv)),
    ]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_library), "reference"])
def test_it_and_its_gradient_are_the_definition(
    implementation: str, shape: tuple[int, ...], mask: str
) -> None:
    arrays = problem(shape, mask)
    for got, expected in zip(run(arrays, implementation), in_float64(arrays), strict=True):
        # Sums of at most 130 terms, or 300 channels, of magnitude 1: their rounding, relative to the largest.
        np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@needs_library
@pytest.mark.parametrize("mask", ["causal", "random"])
def test_the_bits_do_not_depend_on_instruction_set_threads_or_batch(
    mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = problem((3, 70, 90, 4, 2, 24), mask)
    expected = run(arrays, "cpu")
    for isa in cpu.available_isas():
        monkeypatch.setenv("BITNET_KERNELS_ISA", isa)
        for got, want in zip(run(arrays, "cpu"), expected, strict=True):
            np.testing.assert_array_equal(got, want)
    monkeypatch.delenv("BITNET_KERNELS_ISA")
    alone = run(tuple(x[1:2] for x in arrays), "cpu")
    try:
        cpu.set_thread_count(1)
        one_thread = run(arrays, "cpu")
    finally:
        cpu.set_thread_count(threads())
    for got, single, want in zip(one_thread, alone, expected, strict=True):
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(single[0], want[1])


@needs_library
def test_a_token_gets_the_same_bits_in_training_as_in_generation() -> None:
    q, k, v, visible, _ = problem((2, 40, 40, 4, 2, 16), "causal")
    whole = softmax_attention(q, k, v, visible, 0.25)
    last = cached_attention(q[:, -1:], k, v, visible[:, -1:], 0.25, length=40)
    np.testing.assert_array_equal(last[:, 0], whole[:, -1])


@needs_library
def test_a_nan_stays_visible_and_a_query_without_keys_has_no_gradient() -> None:
    q, k, v, visible, g = problem((1, 12, 12, 2, 1, 8), "causal")
    y, dq, dk, _ = run((q.at[0, 5, 1, 2].set(jnp.nan), k, v, visible, g), "cpu")
    assert np.isnan(y[0, 5, 1]).all()
    assert np.isnan(dq[0, 5, 1]).all()
    assert np.isnan(dk[0, :6]).all()
    assert np.isfinite(np.delete(y, 5, axis=1)).all()
    _, dq, _, _ = run((q, k, v, visible.at[0, 3].set(False), g), "cpu")
    assert not dq[0, 3].any()


def test_invalid_arguments_are_refused() -> None:
    q, k, v, visible, _ = problem((1, 4, 4, 2, 1, 8), "causal")
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((q, k, v, visible[:, :2], 1.0), {}, "visible is"),
        ((q.astype(jnp.bfloat16), k, v, visible, 1.0), {}, "expected float32"),
        ((q, k, v, visible, 1.0), {"implementation": "gpu"}, "implementation='gpu'"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            softmax_attention(*arguments, **options)
