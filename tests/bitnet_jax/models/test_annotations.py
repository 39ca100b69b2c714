"""The annotations of arrays are checked in the tests of these packages; see tests/bitnet_jax/conftest.py."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from bitnet_jax.models.binary_cnn import pooled
from bitnet_jax.nn.rotary import rotate
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.training.losses import cross_entropy_sums

ONES = jnp.ones((2, 3, 4, 8))
WRONG: dict[str, Callable[[], object]] = {
    "quantization": lambda: Precision(weight="binary").quantize_weight(ONES[0]),  # three axes for two
    "nn": lambda: rotate(ONES, jnp.zeros((3, 2), jnp.int32), 1e4),  # B and T exchanged
    "models": lambda: pooled(ONES[0], "max"),
    "training": lambda: cross_entropy_sums(ONES, jnp.zeros((2, 3), jnp.int32)),  # *batch differs
}


@pytest.mark.parametrize("package", WRONG)
def test_a_wrong_shape_is_found(package: str) -> None:
    with pytest.raises(TypeCheckError):
        WRONG[package]()


@pytest.mark.unchecked_annotations
def test_a_marked_test_may_pass_wrong_types() -> None:
    assert Precision(weight="binary").quantize_weight(ONES[0]).codes.shape == ONES[0].shape
