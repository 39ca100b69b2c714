"""The amount of a blend, and its exact ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization.warmup import blend, check_share, warm_up


@pytest.mark.parametrize(
    ("progress", "share", "expected"),
    [(0.0, 0.2, 0.0), (0.1, 0.2, 0.5), (0.2, 0.2, 1.0), (0.9, 0.2, 1.0), (0.0, 0.0, 1.0), (0.5, 0.0, 1.0)],
)
def test_the_amount_grows_in_proportion_to_progress(progress: float, share: float, expected: float) -> None:
    assert float(warm_up(progress, share)) == pytest.approx(expected)
    assert float(warm_up(jnp.float32(progress), share)) == pytest.approx(expected)


def test_after_the_warm_up_of_a_known_progress_the_amount_is_a_number() -> None:
    """So that a model that is not in training computes nothing for it."""
    assert isinstance(warm_up(1.0, 0.2), float)
    assert isinstance(warm_up(jnp.float32(0.5), 0.0), float)


@pytest.mark.optimized
@pytest.mark.parametrize("compiled", [True, False])
def test_a_blend_by_hand_and_its_ends_bit_for_bit(compiled: bool) -> None:
    of = jax.jit(blend) if compiled else blend
    assert float(of(jnp.float32(3.0), jnp.float32(-1.0), jnp.float32(0.25))) == 0.75 * 3 - 0.25
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.standard_normal(1000) * 10.0 ** rng.integers(-6, 6, 1000), jnp.float32) for _ in "ab"
    )
    np.testing.assert_array_equal(of(a, b, jnp.float32(0.0)), a)
    np.testing.assert_array_equal(of(a, b, jnp.float32(1.0)), b)
    assert (np.asarray(a + 1.0 * (b - a)) != b).any(), "the other form is not exact"


def test_a_share_of_all_of_training_is_refused() -> None:
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"x: got {share}, expected a share of training"):
            check_share("x", share)
