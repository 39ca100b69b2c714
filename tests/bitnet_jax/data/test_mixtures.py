"""Batches from several streams: exact weights, whole epochs, and a pure function of the step."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_jax.data import DataError, MixedBatches, TokenBatches
from bitnet_jax.data.mixtures import CYCLE, shares

WEIGHTS = (3.0, 1.0, 0.5)


def mixed(seed: int = 1, weights: tuple[float, ...] = WEIGHTS, sampling: str = "epoch") -> MixedBatches:
    """Streams of 50, 60 and 70 windows of one token; tokens of stream k are k * 1000 + position."""
    streams = [
        TokenBatches(np.arange(51 + 10 * k, dtype=np.uint16) + np.uint16(1000 * k), 1, 8, seed, sampling)
        for k in range(len(weights))
    ]
    return MixedBatches(streams, weights)


def test_every_cycle_has_the_weights_and_every_epoch_all_windows() -> None:
    batches = mixed()
    rows = np.concatenate([batches.batch(step)["inputs"][:, 0] for step in range(2 * CYCLE // 8)])
    for cycle in rows.reshape(2, CYCLE):
        assert np.bincount(cycle // 1000).tolist() == shares(WEIGHTS) == [2731, 910, 455]
    for k in range(3):
        own, windows = rows[rows // 1000 == k] % 1000, 50 + 10 * k
        whole = own[: len(own) // windows * windows].reshape(-1, windows)
        np.testing.assert_array_equal(np.sort(whole), np.tile(np.arange(windows), (len(whole), 1)))
        assert (whole[0] != whole[1]).any()
    # No source is far from its share over a few hundred rows: 2/3 of 400, standard deviation 9.
    assert abs(np.sum(rows[:400] < 1000) - 400 * 2 / 3) < 5 * 9


def test_a_batch_depends_on_seed_and_step_alone_and_gives_its_rows() -> None:
    batches, again = mixed(), mixed()
    for step in (700, 3, 511, 512):
        whole = batches.batch(step)
        assert set(whole) == {"inputs", "targets"}
        for name, array in whole.items():
            assert array.dtype == np.int32
            np.testing.assert_array_equal(again.batch(step, slice(2, 5))[name], array[2:5])
    assert (mixed(seed=2).batch(0)["inputs"] != batches.batch(0)["inputs"]).any()
    assert batches.batch(0)["inputs"][:, 0].tolist() == [
        1003,
        1005,
        3,
        5,
        24,
        27,
        43,
        44,
    ]  # as a run resumed under other versions


@pytest.mark.parametrize(
    ("weights", "sampling", "expected"),
    [
        ((), "epoch", "positive numbers"),
        ((1.0, 0.0), "epoch", "positive numbers"),
        ((1.0, 1e-9), "epoch", "at least 1 of 4096 rows"),
        ((1.0, 1.0), "windows", "got sampling 'windows'"),
    ],
)
def test_unusable_mixtures_are_refused(weights: tuple[float, ...], sampling: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        mixed(weights=weights, sampling=sampling)


def test_equal_remainders_go_to_the_first_streams() -> None:
    assert shares([1.0, 1.0, 1.0]) == [1366, 1365, 1365]
    assert sum(shares([0.1] * 7)) == CYCLE
