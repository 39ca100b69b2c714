"""AdamW and Muon with the schedules of the low-bit papers.

`t` counts updates from 0, `T` is their total. Every schedule is multiplied by the same linear warm-up
`min(1, (t + 1) / W)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from bitnet_jax.models.stacked import path_in_first_layer
from bitnet_jax.names import check_name
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.training.directions import DIRECTIONS, LARGEST_BFLOAT16_DECAY, stored_in
from bitnet_jax.training.parameter_labels import label_parameters, path_factors
from bitnet_jax.training.width_transfer import rate_factors


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Section `optimizer` of a run config.

    Raises:
      ValueError: an unknown schedule or a number out of range.
    """

    name: str = "adamw"  # adamw, or muon: orthogonalized momentum for hidden matrices, AdamW for the rest
    schedule: str = "cosine"
    learning_rate: float = 1e-3  # peak; the first stage's (virtual) peak in two_stage
    second_learning_rate: float | None = (
        None  # two_stage: the second stage's virtual peak; None: 2/3 of the first
    )
    stage_switch: float = 0.5  # two_stage: share of training after which the second stage begins
    decay_share: float = 0.2  # wsd: share of training spent in the final linear decay
    final_factor: float = 0.0  # linear, cosine, wsd: last learning rate as a factor of the peak
    warmup_steps: int = 0
    weight_decay: float = 0.1  # decoupled, on matrices only
    weight_decay_until: float = 1.0  # share of training with weight decay: BitNet 0.5, TriLM 2/3, always 1.0
    decay_embeddings: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    moments: str = "float32"  # stored averages of gradients: float32 or bfloat16, which halves them
    clip_norm: float | None = 1.0  # global norm of the gradient; None: no clipping
    scale_learning_rate_factor: float = (
        1.0  # learned quantizer scales and shifts: factor on their learning rate
    )
    # Factors on the learning rate by pattern of a parameter's path, as {"layers_0/*": 0.1}. Those of all patterns that
    # match are multiplied; 0 freezes. None: 1 everywhere
    rates: Mapping[str, float] | None = None
    # hidden_size at which learning_rate was tuned, see width_transfer.py; None: the same rate at every width
    base_width: int | None = None
    ema_decay: float | None = None  # also evaluate an exponential moving average of the weights; None: do not

    def __post_init__(self) -> None:
        check_name("optimizer.name", self.name, DIRECTIONS)
        check_name("optimizer.schedule", self.schedule, SCHEDULES)
        check_name("optimizer.moments", self.moments, ("float32", "bfloat16"))
        limits = {
            "learning_rate": (0.0, math.inf),
            "stage_switch": (0.0, 1.0),
            "decay_share": (0.0, 1.0),
            "final_factor": (0.0, 1.0),
            "warmup_steps": (0, math.inf),
            "weight_decay": (0.0, math.inf),
            "weight_decay_until": (0.0, 1.0),
            "beta1": (0.0, 1.0),
            "beta2": (0.0, 1.0),
            "scale_learning_rate_factor": (0.0, math.inf),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"optimizer.{name}: got {getattr(self, name)}, expected {low} to {high}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm: got {self.clip_norm}, expected a positive number or None")
        for name in ("beta1", "beta2"):
            if self.moments == "bfloat16" and (beta := getattr(self, name)) > LARGEST_BFLOAT16_DECAY:
                raise ValueError(
                    f"optimizer.{name}: got {beta} with moments='bfloat16', in which such a slow average stands still, "
                    f"expected at most {LARGEST_BFLOAT16_DECAY:.4f}; lower it, or store moments in float32"
                )
        if self.rates is not None:
            for pattern, factor in self.rates.items():
                if factor < 0:
                    raise ValueError(
                        f"optimizer.rates: got {factor} for {pattern!r}, expected 0 (frozen) or a positive factor"
                    )
            object.__setattr__(self, "rates", {name: float(f) for name, f in sorted(self.rates.items())})
        if self.base_width is not None and self.base_width < 1:
            raise ValueError(f"optimizer.base_width: got {self.base_width}, expected a hidden_size or None")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"optimizer.ema_decay: got {self.ema_decay}, expected a number between 0 and 1 or None"
            )


Schedule = Callable[[Float[Array, ""], int, OptimizerConfig], Float[Array, ""]]


def constant(t: Float[Array, ""], T: int, config: OptimizerConfig) -> Float[Array, ""]:
    """`peak`."""
    return jnp.full_like(t, config.learning_rate)


def linear(t: Float[Array, ""], T: int, config: OptimizerConfig) -> Float[Array, ""]:
    """`peak * (1 - (1 - final) * p)` with `p = (t - W) / (T - W)`."""
    return config.learning_rate * (1 - (1 - config.final_factor) * _after_warmup(t, T, config))


def cosine(t: Float[Array, ""], T: int, config: OptimizerConfig) -> Float[Array, ""]:
    """`peak * (final + (1 - final) * (1 + cos(pi * p)) / 2)` with `p = (t - W) / (T - W)`."""
    wave = (1 + jnp.cos(jnp.pi * _after_warmup(t, T, config))) / 2
    return config.learning_rate * (config.final_factor + (1 - config.final_factor) * wave)


def wsd(t: Float[Array, ""], T: int, config: OptimizerConfig) -> Float[Array, ""]:
    """Warm-up, stable, decay: `peak`, then linear to `final * peak` over the last `decay_share * T` updates."""
    decay = max(config.decay_share * T, 1.0)
    p = jnp.clip((t - (T - decay)) / decay, 0.0, 1.0)
    return config.learning_rate * (1 - (1 - config.final_factor) * p)


def two_stage(t: Float[Array, ""], T: int, config: OptimizerConfig) -> Float[Array, ""]:
    """`peak1 * (1 - t/T)` until `t = switch * T`, then `peak2 * (1 - t/T)`.

    Both lines go from their peak at t = 0 to zero at T, so with the switch at one half the second stage starts
    at half of `peak2` (The Era of 1-bit LLMs: Training Tips, Code and FAQ, section on the schedule).
    """
    second = config.second_learning_rate
    peak2 = config.learning_rate * 2 / 3 if second is None else second
    peak = jnp.where(t < config.stage_switch * T, config.learning_rate, peak2)
    return peak * (1 - jnp.clip(t / T, 0.0, 1.0))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "two_stage": two_stage,
}


def _after_warmup(t: Float[Array, ""], T: int, config: OptimizerConfig) -> Float[Array, ""]:
    return jnp.clip((t - config.warmup_steps) / max(T - config.warmup_steps, 1), 0.0, 1.0)


def learning_rate(step: Int[Array, ""] | int, T: int, config: OptimizerConfig) -> Float[Array, ""]:
    t = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum(1.0, (t + 1) / max(config.warmup_steps, 1))
    return SCHEDULES[config.schedule](t, T, config) * warmup


def weight_decay(step: Int[Array, ""] | int, T: int, config: OptimizerConfig) -> Float[Array, ""]:
    """`config.weight_decay` while `t < weight_decay_until * T`, then 0."""
    t = jnp.asarray(step, jnp.float32)
    return jnp.where(t < config.weight_decay_until * T, config.weight_decay, 0.0)


class Optimizer(NamedTuple):
    """A gradient transformation, its two schedules, exposed so that they can be logged, and an average of weights."""

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]  # (gradients, state, params, step) -> (updates, state)
    learning_rate: Callable[[Int[Array, ""]], Float[Array, ""]]
    weight_decay: Callable[[Int[Array, ""]], Float[Array, ""]]
    average: Callable[[PyTree, PyTree], PyTree]  # (state, params after an update) -> state
    averaged: Callable[[PyTree], PyTree | None]  # state -> moving average of params; None: it keeps none
    trained: Callable[[PyTree], PyTree]  # params -> False for those that are frozen, else True


def make_optimizer(config: OptimizerConfig, total_steps: int, width_ratio: float = 1.0) -> Optimizer:
    """`update = -lr(t) * factor * (f * direction(clipped gradient) + wd(t) * parameter)`.

    `wd` applies to weights (and, optionally, embeddings), not to norms, biases and learned scales. `factor` is 1
    except for learned scales and shifts, and what `config.rates` names. `f` is 1 except with `width_ratio`, see
    width_transfer.py; it leaves out the decay, so that a matrix is pulled to zero equally fast at every width.
    Parameters whose factor in `config.rates` is 0 have no state; `trained` tells which.

    Args:
      width_ratio: hidden_size as a multiple of config.base_width.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    direction = DIRECTIONS[config.name](config.beta1, config.beta2, config.epsilon)
    rates = config.rates or {}

    def trained(params: PyTree) -> PyTree:
        return jax.tree.map(lambda factor: factor != 0, path_factors(params, rates))

    if 0 in rates.values():
        direction = optax.masked(direction, trained)
    chain = optax.chain(clip, stored_in(config.moments, direction))
    decayed = {"weight", "end", "embedding"} if config.decay_embeddings else {"weight", "end"}

    def rate(step: Int[Array, ""]) -> Float[Array, ""]:
        return learning_rate(step, total_steps, config)

    def decay(step: Int[Array, ""]) -> Float[Array, ""]:
        return weight_decay(step, total_steps, config)

    def update(
        gradients: PyTree, state: PyTree, params: PyTree, step: Int[Array, ""]
    ) -> tuple[PyTree, PyTree]:
        lr, wd = rate(step), decay(step)

        def scaled(u: Array, p: Array, label: str, f: float, factor: float) -> Array:
            factor *= config.scale_learning_rate_factor if label == "quantizer" else 1.0
            return -lr * factor * (f * u + wd * p) if label in decayed else -lr * factor * (f * u)

        # optax computes `decay ** count` with an int32 count, which strict dtype promotion rejects.
        with jax.numpy_dtype_promotion("standard"):
            directions, chained = chain.update(gradients, state[:2], params)
        factors = (rate_factors(params, width_ratio, config.name), path_factors(params, rates))
        updates = jax.tree.map(scaled, directions, params, label_parameters(params), *factors)
        return updates, (*chained, *state[2:])

    if config.ema_decay is None:
        return Optimizer(
            chain.init, update, rate, decay, lambda state, params: state, lambda state: None, trained
        )
    ema = optax.ema(config.ema_decay, debias=False)

    def init(params: PyTree) -> PyTree:
        return (*chain.init(params), ema.init(params))

    def average(state: PyTree, params: PyTree) -> PyTree:
        return (*state[:2], ema.update(params, state[2])[1])

    def averaged(state: PyTree) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):
            return optax.tree.bias_correction(state[2].ema, config.ema_decay, state[2].count)

    return Optimizer(init, update, rate, decay, average, averaged, trained)


def average_warning(config: OptimizerConfig, precisions: Mapping[str, Precision]) -> str | None:
    """One line if an average of weights is asked for whose codes are not those of any trained model; else None.

    The mean of latents that lie on both sides of a threshold has the code of neither side, or one that they had
    seldom, so in few bits the quantized mean is not near the quantized weights it was taken from.
    """
    few = [path for path, precision in precisions.items() if precision.weight_bits < 2]
    if config.ema_decay is None or not few:
        return None
    return (
        f"warning: optimizer.ema_decay={config.ema_decay} averages the latents of {len(few)} binary or ternary layers "
        f"({few[0]}, ...): the codes of the average can be far from those of the model; compare ema_loss with loss"
    )


def clip_latents(params: dict[str, Any], precisions: Mapping[str, Precision]) -> dict[str, Any]:
    """Clip latent weights to [-c, c] where `Precision.latent_clip` is c (BinaryConnect, 1511.00363)."""
    clips = {f"{path}/weight": p.latent_clip for path, p in precisions.items() if p.latent_clip is not None}

    def clip(path: tuple[Any, ...], leaf: Array) -> Array:
        limit = clips.get(path_in_first_layer(jax.tree_util.keystr(path, simple=True, separator="/")))
        return leaf if limit is None else jnp.clip(leaf, -limit, limit)

    return jax.tree_util.tree_map_with_path(clip, params)
