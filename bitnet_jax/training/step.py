"""One update as one jitted pure function: (state, batch, key) -> (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from bitnet_jax.quantization.precision import Precision
from bitnet_jax.training.losses import LossSums
from bitnet_jax.training.optimizers import Optimizer, clip_latents
from bitnet_jax.training.state import TrainState
from bitnet_jax.training.statistics import empty_statistics, statistics

Batch = Mapping[str, Any]  # arrays whose first axis is the batch
Metrics = dict[str, Any]
ModelState = dict[str, PyTree]  # the collections other than "params", such as batch statistics
# (variables, batch, key or None for a deterministic pass, progress in [0, 1]) -> sums over the batch, and the
# updated collections other than "params"
LossFunction = Callable[
    [Mapping[str, PyTree], Batch, PRNGKeyArray | None, Float[Array, ""] | float], tuple[LossSums, ModelState]
]
# (state, batch, key, collections that are not trained, default none) -> (state, metrics)
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    loss: LossFunction,
    optimizer: Optimizer,
    *,
    total_steps: int,
    precisions: Mapping[str, Precision] | None = None,
    accumulate: int = 1,
    statistics_every: int = 1,
    shardings: TrainState | None = None,
) -> TrainStep:
    """The jitted update. Its state argument is donated and must not be used afterwards.

    All randomness of an update follows from (key, state.step), so a resumed run matches an uninterrupted one. Frozen
    parameters (optimizer.rates) keep their bits; they have no gradient, in norms and statistics too.

    Args:
      loss: weighted sums, not means, so that gradients of micro-batches add up to those of the full batch. Its model
        state is passed from one micro-batch to the next.
      precisions: linear path -> Precision, for latent clipping and statistics of the codes.
      accumulate: number of micro-batches, taken in order from the batch's first axis.
      statistics_every: updates between measurements of the codes, with -1 in the metrics in between; 0: never.
      shardings: of the returned state, normally those of the input state (sharding.state_shardings).

    Returns:
      A function whose metrics are the scalars loss, accuracy, grad_norm, update_norm, learning_rate, weight_decay
      and finite (False if the loss or a norm is NaN or infinite), and `statistics` (see Statistics).
    """
    precisions = precisions or {}

    def summed_loss(
        params: PyTree,
        model_state: ModelState,
        frozen: Mapping[str, PyTree],
        batch: Batch,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Array, tuple[LossSums, ModelState]]:
        sums, model_state = loss({"params": params, **model_state, **frozen}, batch, key, progress)
        return sums.loss, (sums, model_state)

    gradient = jax.grad(summed_loss, has_aux=True)

    def gradients_and_sums(
        state: TrainState, frozen: Mapping[str, PyTree], batch: Batch, key: PRNGKeyArray, progress: Array
    ) -> tuple[PyTree, tuple[LossSums, ModelState]]:
        params = state.params
        if accumulate == 1:
            return gradient(params, state.model_state, frozen, batch, key, progress)

        def add(total: PyTree, indexed: tuple[Array, Batch]) -> tuple[PyTree, None]:
            gradients, (sums, model_state) = total
            index, micro_batch = indexed
            part, (part_sums, model_state) = gradient(
                params, model_state, frozen, micro_batch, jax.random.fold_in(key, index), progress
            )
            gradients, sums = jax.tree.map(jnp.add, (gradients, sums), (part, part_sums))
            return (gradients, (sums, model_state)), None

        micro_batches = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), dict(batch))
        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, params), (LossSums(zero, zero, zero), state.model_state))
        return jax.lax.scan(add, start, (jnp.arange(accumulate), micro_batches))[0]

    def train_step(
        state: TrainState, batch: Batch, key: PRNGKeyArray, frozen: Mapping[str, PyTree] | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        progress = state.step.astype(jnp.float32) / total_steps
        gradients, (sums, model_state) = gradients_and_sums(state, frozen or {}, batch, key, progress)
        trained = optimizer.trained(state.params)
        gradients = jax.tree.map(
            lambda g, moves: g / sums.weight if moves else jnp.zeros_like(g), gradients, trained
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, state.step)
        params = clip_latents(optax.apply_updates(state.params, updates), precisions)
        params = jax.tree.map(lambda old, new, moves: new if moves else old, state.params, params, trained)
        opt_state = optimizer.average(opt_state, params)

        mean_loss = sums.loss / sums.weight
        grad_norm, update_norm = optax.tree.norm(gradients), optax.tree.norm(updates)
        metrics = {
            "loss": mean_loss,
            "accuracy": sums.correct / sums.weight,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "learning_rate": optimizer.learning_rate(state.step),
            "weight_decay": optimizer.weight_decay(state.step),
            "finite": jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm),
        }
        if statistics_every == 1:
            metrics["statistics"] = statistics(state.params, params, gradients, precisions, progress)
        elif statistics_every:
            metrics["statistics"] = jax.lax.cond(
                (state.step + 1) % statistics_every == 0,
                lambda: statistics(state.params, params, gradients, precisions, progress),
                lambda: empty_statistics(precisions),
            )
        return TrainState(state.step + 1, params, opt_state, model_state), metrics

    out_shardings = None if shardings is None else (shardings, shardings.step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
