"""Rotary positions: the complex-number formula, relative positions, layout, dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.nn import rotary
from bitnet_jax.nn.rotary import frequencies

THETA = 10_000.0
B, T, H, h = 2, 5, 3, 8
rotate = jax.jit(rotary.rotate, static_argnums=2)  # compiled once for all tests except the last


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def positions(*rows: range) -> jax.Array:
    return jnp.asarray([list(row) for row in rows], jnp.int32)


def test_one_plane_matches_a_hand_computed_rotation():
    x = jnp.asarray([[[[3.0, 4.0]]]])  # h = 2: one plane, angle = position
    turned = rotate(x, jnp.asarray([[1]], jnp.int32), THETA)[0, 0, 0]
    expected = [3 * np.cos(1) - 4 * np.sin(1), 3 * np.sin(1) + 4 * np.cos(1)]
    np.testing.assert_allclose(turned, expected, rtol=1e-6)  # two float32 products and one sum


def test_frequencies_are_the_powers_of_theta():
    np.testing.assert_array_equal(frequencies(4, 100.0), np.float32([1.0, 0.1]))
    assert frequencies(128, 500_000.0).dtype == np.float32


def test_equals_complex_multiplication_of_channel_i_and_i_plus_half():
    x, at = random(0, B, T, H, h), positions(range(T), range(7, 7 + T))
    z = np.asarray(x[..., : h // 2], np.float64) + 1j * np.asarray(x[..., h // 2 :], np.float64)
    angle = np.asarray(at, np.float64)[..., None] * THETA ** (-np.arange(0, h, 2) / h)
    z = z * np.exp(1j * angle)[:, :, None, :]
    # float32 angles up to 11 radians: one ulp is 1e-6.
    np.testing.assert_allclose(
        rotate(x, at, THETA), np.concatenate([z.real, z.imag], axis=-1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shift", [1, 100, 3000])
def test_scores_depend_only_on_relative_positions(shift):
    q, k = random(1, 1, T, H, h), random(2, 1, T, H, h)

    def scores(offset: int) -> jax.Array:
        at = positions(range(offset, offset + T))
        return jnp.einsum("bthd,bshd->bhts", rotate(q, at, THETA), rotate(k, at, THETA))

    # An angle near `shift` is off by half an ulp, shift * 2^-24; |q||k| is about h.
    np.testing.assert_allclose(scores(shift), scores(0), atol=h * (1e-6 + shift * 2.0**-23))
    assert not np.allclose(scores(0), jnp.einsum("bthd,bshd->bhts", q, k), atol=0.1)


def test_position_zero_is_the_identity_and_norms_are_preserved():
    x = random(3, B, T, H, h)
    np.testing.assert_array_equal(rotate(x, jnp.zeros((B, T), jnp.int32), THETA), x)
    far = rotate(x, positions(range(900, 900 + T), range(T)), THETA)
    lengths = (jnp.linalg.norm(y, axis=-1) for y in (far, x))
    np.testing.assert_allclose(*lengths, rtol=1e-6)  # cos^2 + sin^2 = 1 to float32 rounding


def test_every_row_has_its_own_positions():
    x = random(4, 1, T, H, h)
    both = rotate(jnp.concatenate([x, x]), positions(range(T), range(3, 3 + T)), THETA)
    np.testing.assert_array_equal(both[:1], rotate(x, positions(range(T)), THETA))
    np.testing.assert_array_equal(both[1:], rotate(x, positions(range(3, 3 + T)), THETA))


def test_bfloat16_rounds_cos_and_sin_not_the_angle():
    x, at = random(5, 1, T, H, h), positions(range(4000, 4000 + T))
    low = rotate(x.astype(jnp.bfloat16), at, THETA)
    assert low.dtype == jnp.bfloat16
    # x, cos, the product and the sum are each rounded to 8 bits: a few 2^-8 of |x| < 4. An angle in bfloat16
    # would be off by up to 16 radians at position 4000.
    np.testing.assert_allclose(low.astype(jnp.float32), rotate(x, at, THETA), atol=4 * 4 * 2.0**-8)


def test_odd_head_dim_is_rejected():
    with pytest.raises(ValueError, match="head_dim=7 is odd"):
        rotate(jnp.zeros((1, T, H, 7)), positions(range(T)), THETA)


def test_vmap_equals_loop_and_jit_equals_no_jit():
    x, at = random(7, 3, B, T, H, h), jnp.stack([positions(range(i, i + T), range(T)) for i in range(3)])
    loop = jnp.stack([rotary.rotate(*pair, THETA) for pair in zip(x, at, strict=True)])
    # Fused multiply-add under jit: one rounding less per output.
    np.testing.assert_allclose(jax.vmap(lambda x, at: rotate(x, at, THETA))(x, at), loop, atol=1e-6)
