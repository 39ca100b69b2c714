"""Directions of an update, before learning rate and weight decay: Adam, and Muon for hidden matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import DTypeLike, PyTree

from bitnet_jax.training.parameter_labels import label_parameters

MUON_MOMENTUM = 0.95
# An orthogonal matrix [n, k] has entries of root mean square 1 / sqrt(max(n, k)). Muon's are brought to that of
# Adam's updates, so that both share a learning rate and a weight decay (Muon is Scalable, 2502.16982).
MUON_RMS = 0.2
# Largest decay of an average that is stored in bfloat16. A neighbour of x is up to x / 128 away, so a larger one would
# round back the change of an average whose gradients are zero.
LARGEST_BFLOAT16_DECAY = 1 - 2**-8

_AVERAGES = ("mu", "nu")  # fields of optax's states


def adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """`m / (sqrt(v) + epsilon)` with bias-corrected averages m of the gradient and v of its square (1412.6980)."""
    return optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)


def muon(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Orthogonalized momentum for hidden matrices, Adam for everything else.

    Hidden matrices are those labelled "weight", in [..., outputs, inputs]; leading axes are separate matrices. With the
    singular value decomposition `U S V` of the Nesterov momentum, the direction is about
    `0.2 sqrt(max(outputs, inputs)) U V`, by five steps of Newton-Schulz (Jordan 2024). It does not depend on the size
    of the gradient.
    """
    by_rows = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    orthogonal = optax.contrib.scale_by_muon(
        beta=MUON_MOMENTUM, weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: by_rows, updates)
    )
    scaled = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: MUON_RMS * max(u.shape[-2:]) ** 0.5 * u, updates)
    )
    return optax.partition(
        {"hidden": optax.chain(orthogonal, scaled), "others": adam(beta1, beta2, epsilon)},
        lambda params: jax.tree.map(
            lambda label: "hidden" if label == "weight" else "others", label_parameters(params)
        ),
    )


DIRECTIONS = {"adamw": adam, "muon": muon}


def stored_in(
    dtype: DTypeLike, direction: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`direction` with its averages of gradients in `dtype` between updates; updates are computed in float32.

    Averages are rounded to the nearest value. Stochastic rounding would need two random numbers per parameter, and
    only for decays above LARGEST_BFLOAT16_DECAY.
    """

    def cast(state: PyTree, to: DTypeLike) -> PyTree:
        def leaf(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
            averaged = any(getattr(key, "name", None) in _AVERAGES for key in path)
            return value.astype(to) if averaged else value

        return jax.tree_util.tree_map_with_path(leaf, state)

    def init(params: PyTree) -> PyTree:
        return cast(direction.init(params), dtype)

    def update(
        gradients: PyTree, state: PyTree, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        directions, state = direction.update(gradients, cast(state, jnp.float32), params)
        return directions, cast(state, dtype)

    return optax.GradientTransformationExtraArgs(init, update)
