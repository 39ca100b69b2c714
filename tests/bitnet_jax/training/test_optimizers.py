"""Learning rate schedules against their formulas, weight decay and clipping."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bitnet_jax.models import ModelConfig
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.training.optimizers import (
    SCHEDULES,
    OptimizerConfig,
    clip_latents,
    learning_rate,
    make_optimizer,
    weight_decay,
)
from bitnet_jax.training.parameter_labels import label_parameters
from bitnet_jax.training.task import abstract_variables

# float32 holds 7 digits; the schedules do two or three roundings
CLOSE = 1e-6


def lr(step: int, total: int, **fields: object) -> float:
    return float(learning_rate(step, total, OptimizerConfig(**fields)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_schedule(name: str) -> None:
    measured = [lr(t, 100, schedule=name, learning_rate=1.0, warmup_steps=10) for t in range(10)]
    # only two_stage decays from the first update; the other schedules start at the end of warm-up
    shape = [1 - t / 100 if name == "two_stage" else 1.0 for t in range(10)]
    np.testing.assert_allclose(measured, [s * (t + 1) / 10 for t, s in enumerate(shape)], rtol=CLOSE)


@pytest.mark.parametrize(
    ("fields", "step", "expected"),
    [
        (dict(schedule="constant"), 0, 2.0),
        (dict(schedule="constant"), 99, 2.0),
        (dict(schedule="linear", warmup_steps=20), 60, 1.0),
        (dict(schedule="linear", warmup_steps=20), 100, 0.0),
        (dict(schedule="linear", final_factor=0.1), 100, 0.2),
        (dict(schedule="linear", final_factor=0.1), 50, 2.0 * (1 - 0.9 * 0.5)),
        (dict(schedule="cosine", warmup_steps=20), 40, 2.0 * (1 + math.cos(math.pi / 4)) / 2),
        (dict(schedule="cosine", final_factor=0.1), 50, 2.0 * (0.1 + 0.9 * 0.5)),
        (dict(schedule="cosine", final_factor=0.1), 100, 0.2),
        (dict(schedule="wsd", decay_share=0.2), 80, 2.0),
        (dict(schedule="wsd", decay_share=0.2), 90, 1.0),
        (dict(schedule="wsd", decay_share=0.2, final_factor=0.5), 100, 1.0),
        (dict(schedule="two_stage", stage_switch=2 / 3, second_learning_rate=0.6), 66, 2.0 * 0.34),
        (dict(schedule="two_stage", stage_switch=2 / 3, second_learning_rate=0.6), 67, 0.6 * 0.33),
    ],
)
def test_schedules_at_known_points(fields: dict[str, object], step: int, expected: float) -> None:
    assert lr(step, 100, learning_rate=2.0, **fields) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_two_stage_gives_the_published_rates_of_the_700m_recipe() -> None:
    """As plotted in the paper: 1.5e-3, about 0.75e-3 and 0.5e-3 on both sides of the switch, 0 at the end."""
    recipe = dict(
        schedule="two_stage",
        learning_rate=1.5e-3,
        second_learning_rate=1e-3,
        warmup_steps=375,
        weight_decay=0.1,
    )
    total = 100_000
    assert lr(374, total, **recipe) == pytest.approx(1.5e-3 * (1 - 0.00374), rel=1e-5)
    assert lr(49_999, total, **recipe) == pytest.approx(0.75e-3, rel=1e-4)
    assert lr(50_000, total, **recipe) == pytest.approx(0.5e-3, rel=1e-4)
    assert lr(99_999, total, **recipe) == pytest.approx(1e-8, rel=1e-2)
    assert lr(100_000, total, **recipe) == 0
    assert lr(50_000, total, schedule="two_stage", learning_rate=1.5e-3) == pytest.approx(
        0.5e-3
    )  # default 2/3

    for until, last_decayed in ((0.5, 49_999), (2 / 3, 66_666), (1.0, 99_999)):
        config = OptimizerConfig(weight_decay=0.1, weight_decay_until=until)
        assert float(weight_decay(last_decayed, total, config)) == np.float32(0.1)
        assert float(weight_decay(last_decayed + 1, total, config)) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(schedule="cosin"), "schedule: got 'cosin'.*cosine"),
        (dict(beta2=1.5), "beta2: got 1.5"),
        (dict(clip_norm=0.0), "clip_norm: got 0"),
        (dict(weight_decay_until=float("nan")), "weight_decay_until"),
    ],
)
def test_invalid_settings_are_rejected(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


def test_every_parameter_of_every_recipe_has_a_label() -> None:
    shape = dict(vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, ffn_size=8, max_length=4)
    config = ModelConfig(**shape, precision="bit", position="learned", use_bias=True, tie_embeddings=False)
    labels = label_parameters(abstract_variables(config)["params"])
    linear = labels["layers_0"]["mlp"]["up_proj"]
    assert linear == {
        "weight": "weight", "bias": "bias", "activation_scale": "quantizer", "activation_shift": "quantizer"
    }  # fmt: skip
    assert labels["embed"]["embedding"] == labels["position_embed"]["embedding"] == "embedding"
    assert labels["final_norm"]["scale"] == "norm"
    assert labels["lm_head"]["weight"] == "end"
    learned = label_parameters(
        abstract_variables(dataclasses.replace(config, precision="paretoq_2"))["params"]
    )
    assert learned["layers_0"]["attention"]["q_proj"]["weight_scale"] == "quantizer"


def test_a_parameter_of_unknown_kind_is_rejected() -> None:
    with pytest.raises(ValueError, match="layer/kernel.*no label"):
        label_parameters({"layer": {"kernel": jnp.ones(2)}})


PARAMS = {
    "embed": {"embedding": np.array([1.0, -2.0], np.float32)},
    "layer": {
        "weight": np.array([3.0, -4.0], np.float32),
        "weight_scale": np.array([0.5], np.float32),
        "bias": np.array([1.0], np.float32),
    },
    "norm": {"scale": np.array([1.0], np.float32)},
}


def one_update(gradient: float, **fields: object) -> dict[str, float]:
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", learning_rate=0.1, **fields), 10)
    params = jax.tree.map(jnp.asarray, PARAMS)
    gradients = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params, jnp.int32(0))
    return {jax.tree_util.keystr(k, simple=True, separator="/"): float(u[0]) for k, u in leaves(updates)}


def leaves(tree: object) -> list[tuple[object, jax.Array]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def test_decay_applies_only_to_matrices_and_learned_scales_have_a_separate_rate() -> None:
    updates = one_update(0.0, weight_decay=0.5, clip_norm=None)
    assert updates["layer/weight"] == pytest.approx(-0.1 * 0.5 * 3.0)
    assert updates["embed/embedding"] == pytest.approx(-0.1 * 0.5 * 1.0)
    assert updates["layer/bias"] == updates["norm/scale"] == updates["layer/weight_scale"] == 0
    assert one_update(0.0, decay_embeddings=False)["embed/embedding"] == 0

    updates = one_update(1.0, weight_decay=0.0, clip_norm=None, scale_learning_rate_factor=0.01)
    assert updates["layer/bias"] == pytest.approx(-0.1, rel=1e-5)  # Adam's first step has magnitude one
    assert updates["layer/weight_scale"] == pytest.approx(-0.001, rel=1e-5)


def test_updates_equal_optax_adamw_for_shared_settings() -> None:
    config = OptimizerConfig(schedule="constant", learning_rate=0.01, weight_decay=0.1, clip_norm=0.3)
    ours = make_optimizer(config, 10)
    with jax.numpy_dtype_promotion("standard"):
        theirs = optax.chain(
            optax.clip_by_global_norm(0.3), optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.1)
        )
    params = {"a": {"weight": jnp.array([1.0, -2.0, 0.5])}}
    state, their_params = ours.init(params), params
    their_state = theirs.init(params)
    for step in range(3):
        gradients = {"a": {"weight": jnp.array([3.0, -1.0, step - 1.0])}}
        updates, state = ours.update(gradients, state, params, jnp.int32(step))
        params = optax.apply_updates(params, updates)
        with jax.numpy_dtype_promotion("standard"):
            updates, their_state = theirs.update(gradients, their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
    # the same arithmetic except for the order of one product
    np.testing.assert_allclose(params["a"]["weight"], their_params["a"]["weight"], rtol=CLOSE)


def test_clipping_is_applied_before_adam() -> None:
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, weight_decay=0.0), 10)
    params = {"a": {"weight": jnp.zeros(2)}}
    gradients = {"a": {"weight": jnp.array([30.0, 40.0])}}
    _, state = optimizer.update(gradients, optimizer.init(params), params, jnp.int32(0))
    first_moment = jax.tree.leaves(state)[1]
    np.testing.assert_allclose(first_moment, [0.1 * 0.6, 0.1 * 0.8], rtol=1e-5)


def test_latents_are_clipped_where_their_precision_requires_it() -> None:
    params = {
        "a": {"weight": jnp.array([2.0, -0.5, -3.0]), "bias": jnp.array([2.0])},
        "b": {"weight": jnp.array([2.0])},
    }
    precisions = {"a": Precision(weight="binary_raw", latent_clip=1.0), "b": Precision(weight="binary")}
    clipped = clip_latents(params, precisions)
    np.testing.assert_array_equal(clipped["a"]["weight"], [1.0, -0.5, -1.0])
    np.testing.assert_array_equal(clipped["a"]["bias"], [2.0])
    np.testing.assert_array_equal(clipped["b"]["weight"], [2.0])


def test_factors_of_matching_patterns_multiply_and_zero_freezes_without_state() -> None:
    rates = {"layer/*": 0.5, "*bias": 0.1, "embed*": 0}
    updates = one_update(1.0, weight_decay=0.5, clip_norm=None, rates=rates)
    # Adam's first step has magnitude one; the factor also scales the decay: 0.1 * 0.5 * (1 + 0.5 * 3)
    assert updates["layer/weight"] == pytest.approx(-0.1 * 0.5 * (1 + 0.5 * 3.0), rel=1e-5)
    assert updates["layer/bias"] == pytest.approx(-0.1 * 0.5 * 0.1, rel=1e-5)
    assert updates["norm/scale"] == pytest.approx(-0.1, rel=1e-5)
    assert updates["embed/embedding"] == 0
    for name in ("adamw", "muon"):
        matrices = {
            layer: {n: jnp.ones((2, 3)) if n == "weight" else p for n, p in part.items()}
            for layer, part in PARAMS.items()
        }
        sizes = [
            sum(leaf.size for leaf in jax.tree.leaves(make_optimizer(config, 10).init(matrices)))
            for config in (OptimizerConfig(name=name), OptimizerConfig(name=name, rates={"embed*": 0.0}))
        ]
        assert sizes[0] - sizes[1] == 2 * PARAMS["embed"]["embedding"].size, "two moments"


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer.rates: got 'layers_9/\\*', which matches no parameter"):
        one_update(1.0, rates={"layers_9/*": 0.1})
    with pytest.raises(ValueError, match="optimizer.rates: got -1.0 for 'embed\\*', expected 0"):
        OptimizerConfig(rates={"embed*": -1.0})
