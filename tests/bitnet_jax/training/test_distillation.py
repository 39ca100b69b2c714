"""Distillation losses against their formulas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.training.config_sections import DistillationConfig
from bitnet_jax.training.distillation import (
    distilled_loss,
    relation_distance,
    relations,
    soft_cross_entropy,
)
from bitnet_jax.training.losses import cross_entropy_sums
from bitnet_jax.training.task import forward

B, T, C = 3, 5, 4
CONFIG = ModelConfig(
    vocab_size=9, hidden_size=8, ffn_size=8, num_layers=2, num_heads=2, num_kv_heads=1, max_length=T, num_classes=C,
    causal=False, position="none", precision="float32",
)  # fmt: skip
TOKENS = jnp.asarray([[4, 3, 2, 1, 2], [3, 0, 8, 3, 3], [4, 3, 4, 6, 5]], jnp.int32)
MASK = jnp.asarray(np.arange(T)[None] < np.array([5, 2, 3])[:, None])


def test_soft_cross_entropy_and_its_gradient() -> None:
    student, teacher = jax.random.normal(jax.random.key(1), (2, B, C))
    T_ = 2.0
    p, q = (
        np.exp(x / T_) / np.exp(x / T_).sum(-1, keepdims=True) for x in map(np.asarray, (teacher, student))
    )
    np.testing.assert_allclose(soft_cross_entropy(student, teacher, T_), -(p * np.log(q)).sum(-1), rtol=1e-5)
    slope = jax.grad(lambda s: soft_cross_entropy(s, teacher, T_).sum())(student)
    np.testing.assert_allclose(slope, (q - p) / T_, rtol=1e-4, atol=1e-6)


def captured(seed: int) -> tuple[Any, Any, dict[str, Any]]:
    variables = Transformer(CONFIG).init(jax.random.key(seed), TOKENS)
    batch = {"inputs": TOKENS, "mask": MASK}
    output, state = forward(Transformer(CONFIG), variables, batch, None, 1.0, ("intermediates",))
    return variables, output, state["intermediates"]


def test_relations_are_normalized_products_of_real_tokens() -> None:
    _, _, seen = captured(2)
    found = relations(seen, MASK)
    assert found.shape == (B, 2, 3, 2, T, T)
    ((q, k, _),) = seen["layers_1"]["attention"]["qkv"]
    for head in range(2):
        for index, x in ((0, q[:, :, head]), (1, k[:, :, 0])):  # both share one key head
            real = np.asarray(x[1, :2])  # the second text has two tokens
            expected = np.zeros((T, T), np.float32)
            expected[:2, :2] = real @ real.T / np.linalg.norm(real @ real.T)
            np.testing.assert_allclose(found[1, 1, index, head], expected, rtol=1e-4, atol=1e-6)


def test_the_distance_depends_on_directions_and_not_on_magnitudes() -> None:
    _, _, seen = captured(2)
    _, _, other = captured(3)
    own = relations(seen, MASK)
    larger = relations(jax.tree.map(lambda x: 3 * x, seen), MASK)
    assert float(jnp.max(relation_distance(own, larger))) < 1e-4
    theirs = relations(other, MASK)
    difference = np.asarray(own - theirs)
    expected = np.sqrt(np.square(difference).sum((-2, -1))).mean(-1).sum((1, 2))
    np.testing.assert_allclose(relation_distance(own, theirs), expected, rtol=1e-4)
    slope = jax.grad(lambda x: relation_distance(x, own).sum())(own)
    assert np.isfinite(slope).all()  # including where both agree


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    variables, output, seen = captured(2)
    _, teacher_output, teacher_seen = captured(3)
    batch = {
        "inputs": TOKENS, "mask": MASK, "targets": jnp.array([0, 1, 3]), "weights": jnp.array([1.0, 0.5, 2.0]),
        "teacher": {"logits": teacher_output.logits, "relations": relations(teacher_seen, MASK)},
    }  # fmt: skip
    config = DistillationConfig(teacher="x", labels=0.3, logits=0.7, temperature=1.5, relations=0.2)
    sums, state = distilled_loss(Transformer(CONFIG), config)(variables, batch, None, 1.0)
    hard = cross_entropy_sums(output.logits, batch["targets"], batch["weights"])
    soft = soft_cross_entropy(output.logits, teacher_output.logits, 1.5)
    apart = relation_distance(relations(seen, MASK), batch["teacher"]["relations"])
    expected = 0.3 * hard.loss + jnp.sum(batch["weights"] * (0.7 * soft + 0.2 * apart))
    assert float(sums.loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(sums.correct) == float(hard.correct)
    assert state == {}


@pytest.mark.parametrize("change", [{"labels": -1.0}, {"temperature": 0.0}])
def test_invalid_weights_are_rejected(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"distillation.{next(iter(change))}: got"):
        DistillationConfig(**change)
