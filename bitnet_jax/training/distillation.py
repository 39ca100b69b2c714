"""Distillation of classifiers: matching the teacher's probabilities and its Q, K, V similarity matrices.

A teacher is a function from batches to batches: it adds its outputs to the batch, where the student's loss
reads them.

    logits      sum_i w_i sum_c -softmax(t_i / T)_c log softmax(s_i / T)_c              (soft cross entropy)
    relations   per layer and for each of Q, K, V: |S / |S| - S' / |S'||, S = X X^T over the unpadded tokens of a
                head (direction matching, BiBERT 2203.06390: a binary layer can match directions, not magnitudes)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.training.config_sections import DistillationConfig
from bitnet_jax.training.load import load_run
from bitnet_jax.training.losses import LossSums, cross_entropy_sums
from bitnet_jax.training.step import Batch, LossFunction, ModelState
from bitnet_jax.training.task import forward

Relations = Float[Array, "B layers 3 H T T"]


def soft_cross_entropy(
    student: Float[Array, "B C"], teacher: Float[Array, "B C"], temperature: float = 1.0
) -> Float[Array, " B"]:
    """`-sum_c softmax(teacher / T)_c log softmax(student / T)_c` per example, in float32."""
    p = jax.nn.softmax(teacher.astype(jnp.float32) / temperature, axis=-1)
    return -jnp.sum(p * jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1), axis=-1)


def relations(intermediates: Mapping[str, Any], mask: Bool[Array, "B T"]) -> Relations:
    """`X X^T` of the queries, keys and values of every layer and head, divided by its Frobenius norm.

    Padding counts as zero. `intermediates` holds what Attention sows under "qkv"; kv heads shared by several query
    heads are repeated.
    """
    layers, real = [], mask.astype(jnp.float32)[:, None, :, None, None]
    for i in range(len([name for name in intermediates if name.startswith("layers_")])):
        ((q, k, v),) = intermediates[f"layers_{i}"]["attention"]["qkv"]
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        x = jnp.stack([q, k, v], axis=1).astype(jnp.float32) * real
        products = jnp.einsum("bxthc,bxshc->bxhts", x, x)
        norm = jnp.sqrt(jnp.sum(jnp.square(products), axis=(-2, -1), keepdims=True))
        layers.append(products / jnp.maximum(norm, 1e-6))
    return jnp.stack(layers, axis=1)


def relation_distance(student: Relations, teacher: Relations) -> Float[Array, " B"]:
    """Frobenius distance, summed over layers and Q, K, V, averaged over heads."""
    squares = jnp.sum(jnp.square(student - teacher), axis=(-2, -1))
    return jnp.sum(jnp.mean(jnp.sqrt(squares + 1e-12), axis=-1), axis=(1, 2))  # finite gradient at 0


def distilled_loss(model: nn.Module, config: DistillationConfig) -> LossFunction:
    """`labels * cross entropy + logits * soft cross entropy + relations * distance`, for batches with `teacher`."""

    def loss(
        variables: Mapping[str, PyTree],
        batch: Batch,
        key: PRNGKeyArray | None,
        progress: Float[Array, ""] | float,
    ) -> tuple[LossSums, ModelState]:
        output, state = forward(model, variables, batch, key, progress, ("batch_stats", "intermediates"))
        intermediates = state.pop("intermediates", {})
        sums = cross_entropy_sums(output.logits, batch["targets"], batch.get("weights"))
        weights = batch.get("weights", jnp.ones(batch["targets"].shape, jnp.float32))
        terms = config.logits * soft_cross_entropy(
            output.logits, batch["teacher"]["logits"], config.temperature
        )
        if config.relations:
            own = relations(intermediates, batch["mask"])
            terms = terms + config.relations * relation_distance(own, batch["teacher"]["relations"])
        return sums._replace(loss=config.labels * sums.loss + jnp.sum(weights * terms)), state

    return loss


def make_teacher(config: DistillationConfig, student: ModelConfig) -> Callable[[Batch], dict[str, Any]]:
    """The teacher of a run folder: adds `teacher` to a batch: logits and, if their weight is not 0, relations.

    Raises:
      RunError, CheckpointError: no such run.
      ValueError: its classes, vocabulary, layers or heads differ from the student's.
    """
    assert config.teacher is not None
    _, teacher, params, _ = load_run(config.teacher)
    shared = ("vocab_size", "num_classes") + (("num_layers", "num_heads") if config.relations else ())
    for name in shared:
        if getattr(teacher, name) != getattr(student, name):
            raise ValueError(
                f"distillation.teacher: got model.{name}={getattr(teacher, name)} in {config.teacher}, expected "
                f"the student's {getattr(student, name)}"
            )
    model = Transformer(teacher)

    @jax.jit
    def outputs(params: PyTree, inputs: Array, mask: Array) -> dict[str, Array]:
        batch = {"inputs": inputs, "mask": mask}
        output, state = forward(model, {"params": params}, batch, None, 1.0, ("intermediates",))
        logits = {"logits": output.logits}
        return logits | ({"relations": relations(state["intermediates"], mask)} if config.relations else {})

    return lambda batch: {**batch, "teacher": outputs(params, batch["inputs"], batch["mask"])}
