"""The plan for a 100B model: its page, its derivations, and exact products without int8."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import PRESETS
from bitnet_jax.nn.products import sums_of_products
from experiments import plan_100b


def test_the_page_is_the_one_written_from_the_results() -> None:
    results = json.loads(plan_100b.RESULTS.read_text())
    assert results.keys() <= plan_100b.CASES.keys()
    assert (plan_100b.PLAN / "README.md").read_text() == plan_100b.page(results)


def test_derivations() -> None:
    chip = plan_100b.Chip(flops=600.0, memory=1, link=6.0, axes=3)
    # 100 operations a byte; 2 bytes a weight and 2 operations a token: 100 tokens. An update: (2 * 2 + 4) / 8 * 100.
    assert plan_100b.tokens_to_hide(chip, 2.0, axes=3) == (100, 100)
    assert plan_100b.tokens_to_hide(chip, 2.0, axes=1) == (300, 300)
    assert plan_100b.days("v5p", 1024) == pytest.approx(plan_100b.days("v5p", 256) / 4)
    weights = sum(n * k for n, k in PRESETS["100b"].linear_shapes().values())
    assert plan_100b.flops_per_token() == pytest.approx(6 * weights, rel=0.03)  # attention is the rest


def test_bfloat16_products_of_codes_are_exact_up_to_the_bound() -> None:
    k = plan_100b.largest_exact_inputs()
    assert k >= max(inputs for config in PRESETS.values() for _, inputs in config.linear_shapes().values())
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (3, k)).astype(np.float32)
    w = rng.integers(-1, 2, (2, k)).astype(np.float32)
    x[0], w[0] = -128, -1  # the largest sum: 2^24
    exact = x.astype(np.int64) @ w.astype(np.int64).T
    assert exact[0, 0] == 2**24
    np.testing.assert_array_equal(sums_of_products(jnp.asarray(x), jnp.asarray(w), "bfloat16"), exact)
