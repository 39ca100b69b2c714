"""Sampling: each filter against its formula in NumPy, and properties that hold for any logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitnet_jax.inference import sampling
from bitnet_jax.inference.sampling import SamplingConfig, filtered_logits, most_likely, next_token

LOGITS = np.random.default_rng(3).normal(0, 2, (4, 11)).astype(np.float32)
# Distinct multiples of 1/4 up to 20: no ties within the float32 error of a softmax.
ANY_LOGITS = arrays(np.int8, (2, 7), elements=st.integers(-80, 80), unique=True).map(
    lambda a: a.astype(np.float32) / 4
)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def kept(logits: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(logits))


def distribution(logits: np.ndarray, **config: Any) -> np.ndarray:
    return np.asarray(
        jax.nn.softmax(filtered_logits(jnp.asarray(logits), SamplingConfig(**config).filters()), axis=-1)
    )


@settings(deadline=None)
@given(ANY_LOGITS, st.sampled_from([1, 3, 6, 9]))
def test_top_k_keeps_the_k_largest(logits: np.ndarray, k: int) -> None:
    filtered = sampling.keep_top_k(jnp.asarray(logits), k)
    expected = np.argsort(np.argsort(-logits, axis=-1), axis=-1) < k
    np.testing.assert_array_equal(kept(filtered), expected)
    np.testing.assert_array_equal(np.asarray(filtered)[expected], logits[expected])


@settings(deadline=None, max_examples=40)
@given(ANY_LOGITS, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float) -> None:
    filtered = kept(sampling.keep_top_p(jnp.asarray(logits), p))
    for row, mask, probability in zip(logits, filtered, softmax(logits), strict=True):
        assert mask.any()
        assert row[mask].min() > np.max(row[~mask], initial=-np.inf)  # the most likely tokens
        # 1e-6: cumulative probabilities in float32 against float64.
        assert probability[mask].sum() >= p - 1e-6
        least = np.argmin(np.where(mask, row, np.inf))
        assert probability[mask].sum() - probability[least] < p + 1e-6


@settings(deadline=None, max_examples=40)
@given(ANY_LOGITS, st.floats(0.01, 1))
def test_min_p_keeps_tokens_above_the_relative_threshold(logits: np.ndarray, p: float) -> None:
    filtered = kept(sampling.keep_min_p(jnp.asarray(logits), p))
    ratio = softmax(logits) / softmax(logits).max(axis=-1, keepdims=True)
    clear = abs(ratio / p - 1) > 1e-5  # exactly at the threshold float32 may round either way
    np.testing.assert_array_equal(filtered[clear], (ratio >= p)[clear])
    assert (filtered.sum(axis=-1) >= 1).all()


def test_temperature_and_repetition_penalty_match_their_formulas() -> None:
    for temperature in (0.1, 0.7, 1.0, 3.0):
        # float32 against float64: a few units in the last place of the exponent's argument.
        np.testing.assert_allclose(
            distribution(LOGITS, temperature=temperature), softmax(LOGITS / temperature), rtol=2e-5, atol=1e-9
        )
    seen = np.random.default_rng(0).random(LOGITS.shape) < 0.5
    penalized = sampling.penalize_repetition(jnp.asarray(LOGITS), jnp.asarray(seen), 1.7)
    expected = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.7, LOGITS * 1.7), LOGITS)
    np.testing.assert_allclose(penalized, expected, rtol=1e-6)


def test_ties_go_to_the_lower_id_in_every_filter() -> None:
    tied = jnp.asarray([[1.0, 3.0, 3.0, 0.0, 3.0]])
    assert kept(sampling.keep_top_k(tied, 2)).tolist() == [[False, True, True, False, False]]
    assert kept(sampling.keep_top_p(tied, 0.5)).tolist() == [[False, True, True, False, False]]
    assert kept(sampling.keep_min_p(tied, 1.0)).tolist() == [[False, True, True, False, True]]
    assert next_token(tied, jax.random.key(0), SamplingConfig().filters()).tolist() == [1]


@pytest.mark.extended(after=2)
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=1.0, top_k=1),
        SamplingConfig(temperature=5.0, top_k=1, top_p=0.3, min_p=0.2),
        SamplingConfig(temperature=1.0, top_p=1e-6),
        SamplingConfig(temperature=1e-5),
    ],
)
def test_filters_that_leave_one_token_are_greedy(config: SamplingConfig) -> None:
    for seed in range(5):
        token = next_token(jnp.asarray(LOGITS), jax.random.key(seed), config.filters())
        np.testing.assert_array_equal(token, LOGITS.argmax(axis=-1))


def test_neutral_values_change_nothing() -> None:
    plain = filtered_logits(jnp.asarray(LOGITS), SamplingConfig(temperature=1.0).filters())
    neutral = SamplingConfig(
        temperature=1.0, top_k=11, top_p=1.0, min_p=0.0, repetition_penalty=1.0
    ).filters()
    np.testing.assert_array_equal(filtered_logits(jnp.asarray(LOGITS), neutral), plain)


def test_extreme_logits_give_a_valid_distribution() -> None:
    logits = np.asarray([[1e30, -1e30, 0.0, 1e30], [-np.inf, -np.inf, -5.0, -np.inf]], np.float32)
    probability = distribution(logits, temperature=1e-5, top_k=3, top_p=0.9, min_p=0.1)
    np.testing.assert_allclose(probability, [[0.5, 0, 0, 0.5], [0, 0, 1, 0]])


EXTREMES = st.one_of(
    st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -0.0, 3e38, -3e38, 1e-38, -1e-38, 1e-45, -np.inf])
)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    arrays(np.float32, (2, 5), elements=EXTREMES),
    st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    st.floats(sampling.MIN_TEMPERATURE, allow_infinity=False),
    st.sampled_from(
        [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.9, "min_p": 0.01}]
    ),
)
def test_every_penalty_and_temperature_gives_a_valid_distribution(
    logits: np.ndarray, penalty: float, temperature: float, filters: dict[str, Any]
) -> None:
    logits[:, 0] = np.maximum(logits[:, 0], -1e4)  # at least one token is possible
    config = SamplingConfig(temperature=temperature, repetition_penalty=penalty, **filters)
    seen = jnp.asarray([[True] * 5, [True, False, True, False, False]])
    filtered = np.asarray(filtered_logits(jnp.asarray(logits), config.filters(), seen))
    assert not np.isnan(filtered).any()
    probability = np.asarray(jax.nn.softmax(filtered, axis=-1))
    np.testing.assert_allclose(probability.sum(axis=-1), 1, rtol=1e-5)
    assert (probability[np.isneginf(logits)] == 0).all()
    greedy = SamplingConfig(repetition_penalty=penalty).filters()
    assert np.isfinite(np.asarray(filtered_logits(jnp.asarray(logits), greedy, seen)).max(axis=-1)).all()


def test_draws_follow_the_distribution_and_the_seed() -> None:
    config = SamplingConfig(temperature=1.3, top_k=4).filters()
    rows = jnp.broadcast_to(jnp.asarray(LOGITS[:1]), (8_000, 11))
    draws = np.asarray(next_token(rows, jax.random.key(7), config))
    expected = distribution(LOGITS[:1], temperature=1.3, top_k=4)[0]
    # The standard error of a proportion is at most 0.5 / sqrt(8000) = 0.0056; five of them.
    np.testing.assert_allclose(np.bincount(draws, minlength=11) / 8_000, expected, atol=0.028)
    np.testing.assert_array_equal(next_token(rows, jax.random.key(7), config), draws)
    assert (np.asarray(next_token(rows, jax.random.key(8), config)) != draws).any()


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    """Over many blocks of tokens, most of which cannot be drawn, up to the ends of [0, 1)."""
    random = np.random.default_rng(3)
    logits = np.where(random.random(1000) < 0.1, random.normal(size=1000), -np.inf).astype(np.float32)
    ends = np.cumsum(softmax(logits[None])[0])
    uniform = np.append(random.random(4000), [0, 1e-45, 1 - 2**-24]).astype(np.float32)
    tokens = np.asarray(sampling.draw(jnp.tile(logits, (len(uniform), 1)), jnp.asarray(uniform)))
    expected = np.searchsorted(ends, uniform, side="right")
    # float32 sums may pass the end of a token earlier or later by a few units in the last place.
    clear = np.abs(ends[:, None] - uniform).min(axis=0) > 1e-6
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(tokens[clear], expected[clear])
    possible = np.flatnonzero(np.isfinite(logits))
    assert np.isin(tokens, possible).all()
    assert tokens[-3] == tokens[-2] == possible[0]
    assert tokens[-1] == possible[-1]


def test_top_p_of_a_vocabulary_is_that_of_sorting() -> None:
    random = np.random.default_rng(4)
    logits = np.round(3 * random.normal(size=(4, 5000)), 1).astype(
        np.float32
    )  # many equal ones, and both zeros
    for p in (0.3, 0.9, 0.999):
        order = np.argsort(-logits, axis=-1, kind="stable")
        before = np.cumsum(np.take_along_axis(softmax(logits), order, axis=-1), axis=-1)
        sizes = 1 + (before[:, :-1] < p).sum(axis=-1)
        expected = np.zeros(logits.shape, bool)
        for row, places, size in zip(expected, order, sizes, strict=True):
            row[places[:size]] = True
        np.testing.assert_array_equal(kept(sampling.keep_top_p(jnp.asarray(logits), p)), expected)


def test_the_draw_of_a_row_does_not_depend_on_the_batch() -> None:
    config = SamplingConfig(temperature=2.0).filters()
    key = jax.random.key(1)
    together = next_token(jnp.asarray(LOGITS), key, config)
    assert next_token(jnp.asarray(LOGITS[:2]), key, config).tolist() == together[:2].tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0, expected 0 .greedy. or at least"),
        ({"temperature": 1e-9}, "temperature: got 1e-09"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"temperature": "hot"}, "temperature: got 'hot', expected a number"),
        ({"top_k": 0}, "top_k: got 0, expected an integer of at least 1"),
        ({"top_k": 2.5}, "top_k: got 2.5"),
        ({"top_k": True}, "top_k: got True"),
        ({"top_p": 0.0}, "top_p: got 0.0, expected more than 0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"min_p": -0.1}, "min_p: got -0.1"),
        ({"min_p": 1.5}, "min_p: got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected a positive number"),
        ({"top_p": None}, "top_p: got None, expected a number"),
    ],
)
def test_out_of_range_values_are_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


def test_a_penalty_needs_the_seen_tokens() -> None:
    with pytest.raises(ValueError, match="no `seen` tokens"):
        filtered_logits(jnp.asarray(LOGITS), SamplingConfig(repetition_penalty=1.2).filters())


@pytest.mark.parametrize(
    "row",
    [[3, 1, 3, 2], [-np.inf] * 4, [1, np.nan, 5, np.nan], [-1, -np.inf, np.inf, np.inf], [0.0, -0.0, -1, -2]],
)
def test_the_most_likely_token_is_the_argmax(row: list) -> None:
    logits = jnp.asarray([row, row[::-1]], jnp.float32)
    for choose in (most_likely, jax.jit(most_likely)):
        np.testing.assert_array_equal(choose(logits), np.argmax(logits, axis=-1))
