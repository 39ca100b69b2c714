"""Recomputing blocks in the backward pass: what is kept for it, and that gradients are the same."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from bitnet_jax.models import ModelConfig, Transformer, init_variables
from bitnet_jax.models.stacked import equal_layers, stack

B, T, D, F, LAYERS = 2, 6, 32, 64, 2
CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=D,
    num_layers=LAYERS,
    num_heads=4,
    ffn_size=F,
    max_length=T,
    norm_placement="pre",
)
TOKENS = np.random.default_rng(0).integers(0, 48, (B, T)).astype(np.int32)


def loss(params: Any, config: ModelConfig) -> Any:
    output: Any = Transformer(config).apply({"params": params}, jnp.asarray(TOKENS))
    return jnp.sum(output.logits**2)


def kept(config: ModelConfig, params: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of what the backward pass reads from the forward pass, other than parameters and constants."""
    found = saved_residuals(partial(loss, config=config), params)
    outside = ("from the argument", "from a constant")
    return sorted(
        (str(value.dtype), value.shape) for value, source in found if not source.startswith(outside)
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_codes_are_kept_as_int8_once_for_layers_of_one_input(stacked: bool) -> None:
    params = init_variables(CONFIG, jax.random.key(0))["params"]
    params = stack(params, equal_layers(CONFIG)) if stacked else params
    with_codes, without = (
        kept(dataclasses.replace(CONFIG, remat=remat), params) for remat in ("codes", True)
    )
    lead, count = ((LAYERS,), 1) if stacked else ((), LAYERS)
    inputs = {D: 3, F: 1}  # of q, k and v, of o, of gate and up; of down
    expected = [
        entry
        for width, times in inputs.items()
        for entry in times * count * [("int8", (*lead, B, T, width)), ("float32", (*lead, B, T, 1))]
    ]
    added = list(with_codes)
    for entry in without:
        added.remove(entry)
    assert sorted(added) == sorted(expected)


@pytest.mark.extended
@pytest.mark.parametrize("recipe", ["bitnet_b158", "bitnet"])
def test_gradients_do_not_depend_on_what_is_kept(recipe: str) -> None:
    plain = dataclasses.replace(CONFIG, precision=recipe)
    params = init_variables(plain, jax.random.key(0))["params"]
    expected, codes = (
        jax.jit(jax.grad(partial(loss, config=dataclasses.replace(plain, remat=remat))))(params)
        for remat in (False, "codes")
    )
    # sums of a backward pass in a different order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), codes, expected)


def test_policies_have_names() -> None:
    with pytest.raises(ValueError, match="model.remat: got 'code', expected one of codes, true or false"):
        dataclasses.replace(CONFIG, remat="code")
    with pytest.raises(ValueError, match="model.remat: got 'codes' with a precision"):
        dataclasses.replace(CONFIG, remat="codes", precision="float32")
