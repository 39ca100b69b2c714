"""Code statistics against a recomputation in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.quantization.precision import Precision
from bitnet_jax.training.statistics import NEAR, quantized_paths, statistics

RNG = np.random.default_rng(0)
BEFORE = RNG.normal(0, 0.02, (6, 8)).astype(np.float32)
AFTER = BEFORE + RNG.normal(0, 0.005, (6, 8)).astype(np.float32)


def tree(weight: np.ndarray, **more: np.ndarray) -> dict[str, object]:
    return {"layers_0": {"mlp": {"up_proj": {"weight": weight, **more}}}, "lm_head": {"weight": weight}}


def measured(precision: Precision, before: dict[str, object], after: dict[str, object]) -> dict[str, float]:
    precisions = {"layers_0/mlp/up_proj": precision, "lm_head": Precision()}
    gradients = jax.tree.map(lambda a, b: 100.0 * (a - b), before, after)
    result = statistics(*jax.tree.map(jnp.asarray, (before, after, gradients)), precisions)
    assert all(values.shape == (1,) for values in result)  # the float head is not measured
    return {name: float(values[0]) for name, values in result._asdict().items()}


def of_codes(found: dict[str, float]) -> dict[str, float]:
    return {name: found[name] for name in ("zero_fraction", "flip_rate", "clipped_share", "scale")}


def ternary_codes(w: np.ndarray) -> np.ndarray:
    return np.clip(np.round(w * (np.float32(1) / np.abs(w).mean())), -1, 1)


def test_statistics_of_ternary_codes() -> None:
    codes_before, codes = ternary_codes(BEFORE), ternary_codes(AFTER)
    found = measured(Precision(weight="ternary_absmean"), tree(BEFORE), tree(AFTER))
    assert of_codes(found) == pytest.approx(
        {
            "zero_fraction": np.mean(codes == 0),
            "flip_rate": np.mean(codes != codes_before),
            "clipped_share": np.mean(np.abs(AFTER) > np.abs(AFTER).mean()),
            "scale": np.abs(AFTER).mean(),
        },
        rel=1e-6,
    )
    assert np.mean(codes != codes_before) > 0  # otherwise the case would be vacuous


def test_statistics_of_binary_codes_with_one_scale_per_output() -> None:
    mean = np.abs(AFTER).mean(-1, keepdims=True)
    found = measured(Precision(weight="binary", granularity="channel"), tree(BEFORE), tree(AFTER))
    assert of_codes(found) == pytest.approx(
        {
            "zero_fraction": 0.0,
            "flip_rate": np.mean((AFTER >= 0) != (BEFORE >= 0)),
            "clipped_share": np.mean(np.abs(AFTER) > mean),
            "scale": mean.mean(),
        },
        rel=1e-6,
    )


def test_learned_scales_are_compared_before_and_after() -> None:
    scales = [np.full((6, 1), size, np.float32) for size in (0.01, 0.02)]
    precision = Precision(weight="int4", scale="learned", granularity="channel")
    got = measured(precision, tree(BEFORE, weight_scale=scales[0]), tree(BEFORE, weight_scale=scales[1]))
    codes = [np.clip(np.round(BEFORE * (1 / scale)), -8, 7) for scale in scales]
    assert of_codes(got) == pytest.approx(
        {
            "zero_fraction": np.mean(codes[1] == 0),
            "flip_rate": np.mean(codes[0] != codes[1]),
            "clipped_share": np.mean(np.abs(BEFORE) > np.abs(codes[1]).max() * 0.02),
            "scale": 0.02,
        },
        rel=1e-6,
    )


def test_latents_at_their_clip_count_as_clipped() -> None:
    clipped = np.clip(AFTER, -0.02, 0.02)
    got = measured(Precision(weight="binary_raw", latent_clip=0.02), tree(BEFORE), tree(clipped))
    assert got["clipped_share"] == pytest.approx(np.mean(np.abs(clipped) == np.float32(0.02)))
    assert 0 < got["clipped_share"] < 1


def test_stochastic_quantizers_count_flips_only_where_the_mean_changes_sign() -> None:
    got = measured(Precision(weight="binary_stochastic"), tree(BEFORE), tree(BEFORE))
    assert got["flip_rate"] == 0


def test_a_float_model_has_no_statistics() -> None:
    precisions = {"lm_head": Precision()}
    assert quantized_paths(precisions) == ()
    assert all(values.shape == (0,) for values in statistics({}, {}, {}, precisions))


def test_statistics_of_latents_and_gradients() -> None:
    found = measured(Precision(weight="ternary_absmean"), tree(BEFORE), tree(AFTER))
    rms = np.sqrt(np.mean(AFTER**2))
    signs = np.fromfunction(lambda i, j: (-1.0) ** (i + j), AFTER.shape)
    moved = (AFTER + NEAR * rms * signs).astype(np.float32)
    near = np.mean(ternary_codes(moved) != ternary_codes(AFTER))
    assert found["latent_rms"] == pytest.approx(rms)
    assert found["weight_grad_norm"] == pytest.approx(100 * np.linalg.norm(BEFORE - AFTER), rel=1e-5)
    assert found["near_threshold"] == pytest.approx(near)
    assert near > 0  # otherwise the case would be vacuous
