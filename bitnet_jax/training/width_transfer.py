"""Width transfer: the learning rate that is best for a narrow model, used for a wider one (muP, 2203.03466).

With `r` the width as a multiple of the one at which the rate was tuned, every size of a block growing in proportion:

    parameter                   initial values    learning rate
    hidden matrix               r^-1/2            1/r for Adam, r^-1/2 for Muon
    its learned scale           r^-1/2            r^-1/2
    gain of the final norm      1/r               1/r
    all others                  1                 1

That is muP's table. A matrix with inputs of size 1 gives outputs of size 1 if its entries are independent and of size
r^-1/2, and changes them by an amount of size 1 if its own changes, which are aligned with the inputs, are of size 1/r.
Muon's change has equal singular values instead, which grow as r^1/2 for entries of a fixed size. muP's factor 1/r on
the logits is in the gain before the head: as Adam's direction does not depend on the size of a gradient, a gain with
1/r of the initial value and of the rate is the same function. So a trained model is an ordinary one.

What is left of muP in few bits: codes times a scale measured or learned from the latents are as large as these, so the
initial values count as in float. The change is coarse, since a code changes only when its latent crosses a threshold,
but a latent that moves by d flips its code (one scale s) with a probability proportional to d / s, so the mean change
is proportional to d. The deviations of n inputs from that mean add up to about sqrt(n d s), of order r^-1/4 for d = 1/r
and s = r^-1/2: they vanish with width. This does not hold where the forward pass has no scale (binary_raw), or where
latents are clipped to a fixed range: such layers are refused. muP's 1/h in attention is left to `model.num_heads`:
wider models have more heads of one size h.

At widths 16 and 64 the option did not help (experiments/studies/width_transfer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import HEADS
from bitnet_jax.quantization.registry import WEIGHT_QUANTIZERS
from bitnet_jax.training.parameter_labels import label_parameters

# Exponents of the width ratio by group: initial values, rate for each optimizer.
_EXPONENTS = {
    "weight": {"init": -0.5, "adamw": -1.0, "muon": -0.5},
    "weight_scale": {"init": -0.5, "adamw": -0.5, "muon": -0.5},
    "final_norm": {"init": -1.0, "adamw": -1.0, "muon": -1.0},
}


def rate_factors(params: Mapping[str, Any], ratio: float, optimizer: str) -> PyTree[float]:
    """The factor on the update direction of every parameter, for an optimizer of optimizers.DIRECTIONS."""
    return _factors(params, ratio, optimizer)


def scaled_initial(params: Mapping[str, Any], ratio: float) -> PyTree:
    """Initial parameters for a model that is `ratio` times as wide."""
    return jax.tree.map(lambda p, f: p if f == 1 else p * f, params, _factors(params, ratio, "init"))


def check_transferable(precisions: Mapping[str, Precision], norm_scale: bool) -> None:
    """Raises ValueError: a model without a gain before its head, or a layer whose scale does not follow its latents."""
    if not norm_scale:
        raise ValueError(
            "optimizer.base_width: got model.norm_scale=False, expected True: the logits are scaled by the final gain"
        )
    for path, precision in precisions.items():
        if path in HEADS or not precision.quantizes_weights:
            continue
        unscaled = precision.scale == "none" or "granularity" not in WEIGHT_QUANTIZERS[precision.weight].uses
        if unscaled or precision.latent_clip is not None:
            raise ValueError(
                f"optimizer.base_width: {path} has weight={precision.weight!r}, scale={precision.scale!r}, "
                f"latent_clip={precision.latent_clip}, expected a scale measured or learned from latents that are not "
                "clipped; choose another recipe, or base_width=None"
            )


def _factors(params: Mapping[str, Any], ratio: float, kind: str) -> PyTree[float]:
    def factor(path: tuple[Any, ...], label: str) -> float:
        names = [key.key for key in path]
        if "final_norm" in names:
            group = "final_norm"
        elif names[-1] == "weight_scale" and not any(name in HEADS for name in names):
            group = "weight_scale"
        else:
            group = label
        return ratio ** _EXPONENTS[group][kind] if group in _EXPONENTS else 1.0

    return jax.tree_util.tree_map_with_path(factor, label_parameters(params))
