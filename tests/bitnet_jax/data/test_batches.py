"""Training batches (each window once per epoch, addressed by step) and evaluation windows (each token scored once)."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax.data import DataError, ExampleBatches, TokenBatches, consecutive_batches, whole_batches
from bitnet_jax.data import batches as module

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(0, 40))


def stream(count: int) -> np.ndarray:
    """Tokens whose value is their position."""
    return np.arange(count, dtype=np.int32)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_every_window_occurs_once_per_epoch(shape: tuple[int, int, int], seed: int, first_epoch: int) -> None:
    length, batch_size, more = shape
    batches = TokenBatches(stream(length * batch_size + 1 + more), length, batch_size, seed)
    windows = batches.windows
    # batch_size consecutive epochs fill whole steps, whatever the number of windows
    first_epoch -= first_epoch % batch_size
    steps = range(first_epoch * windows // batch_size, (first_epoch + batch_size) * windows // batch_size)
    starts = np.concatenate([batches.starts(step) for step in steps]).reshape(batch_size, windows)
    for epoch in starts:
        assert sorted(epoch) == [i * length for i in range(windows)]
    assert batches.epoch(steps[0]) <= first_epoch <= batches.epoch(steps[0]) * (1 + 1 / windows) + 1e-9


@settings(deadline=None)
@given(SHAPES, st.sampled_from(["epoch", "windows"]), st.integers(0, 1000))
def test_inputs_and_targets(shape: tuple[int, int, int], sampling: str, step: int) -> None:
    length, batch_size, more = shape
    tokens = stream(length * batch_size + 1 + more)
    batch = TokenBatches(tokens, length, batch_size, sampling=sampling).batch(step)
    assert batch.keys() == {"inputs", "targets"}
    for part in batch.values():
        assert part.shape == (batch_size, length)
        assert part.dtype == np.int32
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
    np.testing.assert_array_equal(
        batch["inputs"] - batch["inputs"][:, :1], np.tile(np.arange(length), (batch_size, 1))
    )
    assert batch["inputs"].min() >= 0
    assert batch["targets"].max() < len(tokens)


@pytest.mark.parametrize("sampling", ["epoch", "windows"])
def test_a_batch_depends_only_on_seed_and_step(sampling: str) -> None:
    tokens = stream(50_001)
    first = TokenBatches(tokens, 10, 4, seed=3, sampling=sampling)
    in_order = [first.batch(step)["inputs"] for step in range(3000)]  # spans two epochs of 1250 steps
    again = TokenBatches(tokens.astype(np.int64), 10, 4, seed=3, sampling=sampling)
    for step in (2999, 1250, 7, 1249, 2500):  # resuming anywhere, in any order
        np.testing.assert_array_equal(again.batch(step)["inputs"], in_order[step])
    other = TokenBatches(tokens, 10, 4, seed=4, sampling=sampling)
    assert (other.batch(0)["inputs"] != in_order[0]).any()
    assert (in_order[1] != in_order[0]).any()
    # consecutive epochs have different orders
    assert any((in_order[step] != in_order[step + 1250]).any() for step in range(3))


@pytest.mark.parametrize("rows", [slice(0, 4), slice(2, 4), slice(1, 2), slice(3, 3)])
def test_rows_of_a_batch_are_those_of_the_whole_batch(rows: slice) -> None:
    tokens = stream(1001)
    batches = [TokenBatches(tokens, 10, 4, seed=1, sampling=name) for name in ("epoch", "windows")]
    for made in (*batches, ExampleBatches(EXAMPLES, 4, seed=1)):
        for step in (0, 2, 24):  # the last one spans two epochs of 25 steps
            whole, part = made.batch(step), made.batch(step, rows)
            assert whole.keys() == part.keys()
            for name, array in whole.items():
                np.testing.assert_array_equal(part[name], array[rows])


def test_the_order_is_pinned() -> None:
    """A run resumed under another NumPy, or another version of the code, must see the same batches."""
    tokens = stream(1001)
    assert TokenBatches(tokens, 10, 4, seed=1).starts(0).tolist() == [900, 780, 30, 660]
    assert TokenBatches(tokens, 10, 4, seed=1).starts(30).tolist() == [160, 170, 460, 130]  # epoch 1
    assert TokenBatches(tokens, 10, 4, seed=1, sampling="windows").starts(5).tolist() == [299, 103, 195, 106]


@pytest.mark.parametrize("most", [1, 3, 2**7, 2**20, 2**64])
@pytest.mark.parametrize("count", [1, 2, 3, 1000, 1025])
def test_the_order_of_an_epoch_is_a_stable_sort(most: int, count: int) -> None:
    words = np.random.Philox(key=count).random_raw(count) % np.uint64(most - 1 or 1)
    for shifted in (words, words << np.uint64(5)):  # ties in all bits, in the high ones, and in none
        np.testing.assert_array_equal(module.stable_order(shifted), np.argsort(shifted, kind="stable"))


def test_shuffling_by_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "grain.experimental", None)
        with pytest.raises(DataError, match="package grain, which .*; pip install grain"):
            TokenBatches(stream(1001), 10, 4, sampling="shuffle")
    pytest.importorskip("grain", reason="grain is an extra")
    batches = TokenBatches(stream(1031), 10, 4, seed=1, sampling="shuffle")
    order = np.concatenate([batches.starts(step) for step in range(103)])  # 4 epochs of 103 windows
    epochs = order.reshape(4, 103)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(103) * 10, (4, 1)))
    assert len({epoch.tobytes() for epoch in epochs}) == 4
    assert (TokenBatches(stream(1031), 10, 4, seed=2, sampling="shuffle").starts(0) != order[:4]).any()
    whole = batches.batch(25)  # spans two epochs
    np.testing.assert_array_equal(batches.batch(25, slice(1, 3))["targets"], whole["targets"][1:3])
    assert order[:8].tolist() == [20, 360, 160, 890, 710, 940, 830, 850]  # a run resumes under other versions
    monkeypatch.setattr(module, "MOST_SHUFFLED", 100)
    with pytest.raises(DataError, match="got 103 windows, expected at most 100"):
        TokenBatches(stream(1031), 10, 4, sampling="shuffle")


def test_random_windows_are_uniform_over_positions() -> None:
    batches = TokenBatches(stream(14), 4, 3, sampling="windows")
    counts = np.bincount(np.concatenate([batches.starts(step) for step in range(4000)]), minlength=10)
    # 12,000 draws over 10 positions: mean 1,200, standard deviation 33; the tolerance is 5 of them
    assert len(counts) == 10
    assert counts.min() > 1035
    assert counts.max() < 1365


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 4), st.data())
def test_consecutive_windows_score_every_token_exactly_once(
    count: int, length: int, batch_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.none() | st.integers(1, length))
    scored = []
    for batch in consecutive_batches(stream(count), length, batch_size, stride):
        for part in batch.values():
            assert part.shape == (batch_size, length)
        mask = batch["scored"]
        np.testing.assert_array_equal((batch["targets"] - batch["inputs"])[mask], 1)
        in_front = np.broadcast_to(np.arange(1, length + 1), mask.shape)[mask]
        scored += list(zip(batch["targets"][mask].tolist(), in_front.tolist(), strict=True))
    assert [target for target, _ in scored] == list(range(1, count))
    least = 1 if stride is None else length - stride + 1
    for target, in_front in scored:
        assert in_front >= min(target, least)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tokens": stream(40)}, "40 tokens, expected at least 41 for one batch of 4 x 10"),
        ({"length": 0}, "length: got 0"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"sampling": "random"}, "expected one of epoch, shuffle, windows"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_invalid_batch_sizes_are_rejected(change: dict[str, object], expected: str) -> None:
    TokenBatches(stream(41), length=10, batch_size=4)
    with pytest.raises(DataError, match=expected):
        TokenBatches(**({"tokens": stream(41), "length": 10, "batch_size": 4} | change))


def test_invalid_steps_and_windows_are_rejected() -> None:
    with pytest.raises(DataError, match="step: got -1"):
        TokenBatches(stream(41), 10, 4).batch(-1)
    with pytest.raises(DataError, match="expected at least 2"):
        next(consecutive_batches(stream(1), 4, 4))
    for length, stride in ((4, 5), (0, None), (4, 0)):
        with pytest.raises(DataError, match="expected each at least 1"):
            next(consecutive_batches(stream(9), length, 4, stride))


EXAMPLES = {
    "inputs": np.arange(30, dtype=np.float32).reshape(10, 3),
    "targets": np.arange(10, dtype=np.int32),
}


def test_examples_occur_once_per_epoch_and_depend_only_on_the_step() -> None:
    batches = ExampleBatches(EXAMPLES, batch_size=4, seed=3)
    seen = [batches.batch(step) for step in range(5)]
    order = np.concatenate([batch["targets"] for batch in seen])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    for batch in seen:
        np.testing.assert_array_equal(batch["inputs"], EXAMPLES["inputs"][batch["targets"]])
    again = ExampleBatches(EXAMPLES, batch_size=4, seed=3).batch(3)
    np.testing.assert_array_equal(again["targets"], seen[3]["targets"])
    other = ExampleBatches(EXAMPLES, batch_size=4, seed=4).batch(0)
    assert other["targets"].tolist() != seen[0]["targets"].tolist()


def test_whole_batches_contain_every_example_once() -> None:
    found = list(whole_batches(EXAMPLES, 4))
    assert [batch["inputs"].shape for batch in found] == [(4, 3)] * 3
    weights = np.concatenate([batch["weights"] for batch in found])
    targets = np.concatenate([batch["targets"] for batch in found])
    np.testing.assert_array_equal(targets[weights == 1], np.arange(10))
    np.testing.assert_array_equal(weights, [1] * 10 + [0] * 2)


@pytest.mark.parametrize(
    ("examples", "batch_size", "message"),
    [
        (EXAMPLES, 0, "batch_size: got 0, expected at least 1"),
        ({"inputs": np.zeros((2, 1)), "targets": np.zeros(3)}, 1, "expected the same number of each"),
        ({"inputs": np.zeros((0, 1)), "targets": np.zeros(0)}, 1, "at least one"),
    ],
)
def test_unusable_examples_are_rejected(
    examples: dict[str, np.ndarray], batch_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ExampleBatches(examples, batch_size)
    with pytest.raises(DataError, match="step: got -1"):
        ExampleBatches(EXAMPLES, 1).batch(-1)
