"""Batches of texts: each text occurs once, in few distinct shapes."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_jax.evaluation.batching import batches, widths


def test_the_last_width_is_that_of_the_longest_text() -> None:
    assert widths(20) == [20]
    assert widths(32) == [32]
    assert widths(100) == [32, 64, 100]


@pytest.mark.parametrize("longest", [10, 64, 300])
def test_every_text_is_in_exactly_one_batch(longest: int) -> None:
    sizes = np.random.default_rng(0).integers(1, longest + 1, 200)
    found = list(batches(sizes, longest, lambda width: 500 // width))
    assert sorted(i for batch in found for i in batch.texts) == list(range(200))
    for texts, rows, width in found:
        assert 1 <= len(texts) <= rows == max(1, 500 // width)
        assert sizes[texts].max() <= width
        smaller = [other for other in widths(longest) if other < width]
        assert not smaller or sizes[texts].min() > smaller[-1]
    assert len({(rows, width) for _, rows, width in found}) <= len(widths(longest))


def test_the_progress_bar_counts_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(batches(np.array([3, 4, 50]), 64, lambda width: 0, progress=True))) == 3
    assert "3/3" in capsys.readouterr().err
