"""How an update changes the latents and codes of quantized weights, computed from them without a forward pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bitnet_jax.models.stacked import is_stacked, located
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.scales import Quantized, spread

NEAR = 0.05  # of their root mean square, by which latents are moved to see which codes are about to change


class Statistics(NamedTuple):
    """One number per quantized matrix, in the order of `quantized_paths`."""

    zero_fraction: Float[Array, " layers"]  # codes equal to 0 after the update
    flip_rate: Float[Array, " layers"]  # codes that the update changed
    clipped_share: Float[Array, " layers"]  # |w| > largest |code| * scale, or |w| >= latent_clip
    scale: Float[Array, " layers"]  # mean scale after the update
    latent_rms: Float[Array, " layers"]  # root mean square of the latents after the update
    near_threshold: Float[Array, " layers"]  # codes that change if latents move by NEAR, in turn up and down
    weight_grad_norm: Float[Array, " layers"]  # of the gradient of the mean loss, before clipping


def quantized_paths(precisions: Mapping[str, Precision]) -> tuple[str, ...]:
    return tuple(path for path, precision in precisions.items() if precision.quantizes_weights)


def statistics(
    before: PyTree,
    after: PyTree,
    gradients: PyTree,
    precisions: Mapping[str, Precision],
    progress: Float[Array, ""] | float = 1.0,
) -> Statistics:
    """Compare the codes of two parameter trees, with the gradients of the update between them.

    Stochastic quantizers use their deterministic form. Stacked layers (models/stacked.py) are measured one after
    another by one program, each with its own scale.
    """
    first: dict[str, int] = {}  # path in the trees -> its first row
    rows: list[Statistics] = []
    order = []
    for path in quantized_paths(precisions):
        place, layer = located(after, path)
        if place not in first:
            first[place] = sum(row.scale.shape[0] for row in rows)
            measure = functools.partial(_compared, precision=precisions[path], progress=progress)
            trees = tuple(_subtree(tree, place) for tree in (before, after, gradients))
            alone = not is_stacked(place)
            rows.append(
                jax.tree.map(lambda x: x[None], measure(trees)) if alone else jax.lax.map(measure, trees)
            )
        order.append(first[place] + layer)
    empty = Statistics(*[jnp.zeros((0,), jnp.float32)] * len(Statistics._fields))
    if not rows:
        return empty
    together = jax.tree.map(lambda *values: jnp.concatenate(values), *rows)
    if order == sorted(order):
        return together
    return jax.tree.map(lambda values: values[jnp.asarray(order)], together)


def _compared(
    trees: tuple[Mapping[str, Array], ...], precision: Precision, progress: Float[Array, ""] | float
) -> Statistics:
    """Scalars of one linear layer, from its parameters before and after the update, and its gradients."""
    before, after, gradients = trees
    old, new = (_quantize(linear, precision, progress) for linear in (before, after))
    weight, k = after["weight"], after["weight"].shape[-1]
    if precision.latent_clip is None:
        above = weight if new.minimum is None else weight - spread(new.minimum, k)
        clipped = jnp.abs(above) > jnp.max(jnp.abs(new.codes)) * jnp.abs(spread(new.scale, k))
    else:
        clipped = jnp.abs(weight) >= precision.latent_clip
    rms = jnp.sqrt(jnp.mean(weight**2))
    moved = {**after, "weight": weight + NEAR * rms * _alternating(weight.shape)}
    near = _quantize(moved, precision, progress).codes != new.codes
    return Statistics(
        zero_fraction=jnp.mean(new.codes == 0, dtype=jnp.float32),
        flip_rate=jnp.mean(new.codes != old.codes, dtype=jnp.float32),
        clipped_share=jnp.mean(clipped, dtype=jnp.float32),
        scale=jnp.mean(new.scale),
        latent_rms=rms,
        near_threshold=jnp.mean(near, dtype=jnp.float32),
        weight_grad_norm=jnp.sqrt(jnp.sum(gradients["weight"] ** 2)),
    )


def empty_statistics(precisions: Mapping[str, Precision]) -> Statistics:
    """-1 everywhere: not measured at this update. (NaN would raise under jax_debug_nans.)"""
    unmeasured = jnp.full((len(quantized_paths(precisions)),), -1.0, jnp.float32)
    return Statistics(*[unmeasured] * len(Statistics._fields))


def _alternating(shape: tuple[int, ...]) -> Float[Array, "n k"]:
    """1 and -1 in turn along both axes: such a move leaves the mean of the latents and their scale nearly the same."""
    n, k = shape
    return jnp.where((jnp.arange(n)[:, None] + jnp.arange(k)[None, :]) % 2 == 0, 1.0, -1.0)


def _subtree(params: PyTree, path: str) -> dict[str, Any]:
    for name in path.split("/"):
        params = params[name]
    return params


def _quantize(
    linear: Mapping[str, Array], precision: Precision, progress: Float[Array, ""] | float
) -> Quantized:
    return precision.quantize_weight(linear["weight"], scale=linear.get("weight_scale"), progress=progress)
