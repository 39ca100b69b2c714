"""Random packed matrices are valid for any size, and do not repeat noticeably."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_kernels import FORMATS, unpack, validate
from bitnet_kernels.random_packed import POOL_CODES, random_packed, random_panels

# n, k, groups: whole panels and odd sizes, scale groups, and fewer rows than a panel.
SHAPES = ((32, 256, 1), (50, 77, 1), (48, 256, 2), (5, 96, 1), (17, 96, 3))


@pytest.mark.extended(after=len(FORMATS))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_valid_and_use_all_codes(format: str, shape: tuple[int, int, int]) -> None:
    n, k, groups = shape
    w = random_packed(format, (n, k), groups)
    validate(w)
    assert (w.shape, w.groups) == ((n, k), groups)
    values = FORMATS[format].values
    counts = np.array([(np.asarray(unpack(w)) == value).sum() for value in values])
    assert counts.sum() == n * k
    # Uniform draws: five standard deviations below the expected count of a code.
    assert np.abs(counts - n * k / len(values)).max() < 5 * np.sqrt(n * k / len(values)) + 1


def test_matrices_depend_on_the_seed_and_large_ones_consist_of_runs_from_the_pool() -> None:
    k = POOL_CODES // 64  # a pool of four panels
    first, again, other = (
        np.concatenate(list(random_panels("ternary2", (176, k), seed=seed))) for seed in (1, 1, 2)
    )
    assert first.shape == (11, k // 16, 64)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(np.unique(first.reshape(11, -1)[:, :64], axis=0)) == 4
    assert all(len(run) <= 4 for run in random_panels("ternary2", (176, k), seed=1))
