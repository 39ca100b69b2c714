"""The proof that a packed model equals the latent one: same codes, same logits, same greedy tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int

from bitnet_jax.models import Architecture
from bitnet_jax.packed.packing import (
    PackingError,
    Precisions,
    Variables,
    check_codes,
    layers,
    quantize,
)

LOGIT_TOLERANCE = 1e-5  # relative to the largest logit; both do the same float32 operations after exact sums


@dataclasses.dataclass(frozen=True)
class Proof:
    """The result of `prove`, which is only returned if all checks passed."""

    matrices: int  # packed matrices, each of which unpacked to identical codes
    max_relative_logit_error: float  # max |difference| / max |latent logit|
    logits: int  # compared
    tokens_identical: int  # greedy tokens, all of them identical


def prove(
    model: Architecture | nn.Module,
    latent: Variables,
    packed: Variables,
    inputs: Int[Array | np.ndarray, "B T"] | Float[Array | np.ndarray, "B *shape"],
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    *,
    precisions: Precisions | None = None,
    greedy: Callable[..., Array | np.ndarray] | None = None,
    new_tokens: int = 0,
    tolerance: float = LOGIT_TOLERANCE,
) -> Proof:
    """Proves that `packed` equals `latent`, or raises.

    Args:
      model: its config; or any flax module with BitLinear layers that returns logits or an object with the field
        `logits`.
      latent: {"params": latent parameters}, and "batch_stats" if the model has them.
      packed: {"params": ..., "packed": ...}, made by `pack` or loaded from a file, and the same "batch_stats".
      inputs, mask: prompts for the model, padded on the left, or images; their logits are compared.
      precisions: for a module, the Precision of each linear layer by path, as passed to `pack`; None for a config.
      greedy: (config, variables, tokens, mask, n) -> n greedy tokens [B, n], in practice
        `inference.generation.greedy`; an argument, so that packing does not depend on generation.
      new_tokens: tokens to generate for *each* prompt.
      tolerance: on the largest difference of logits, relative to the largest logit.

    Raises:
      PackingError: with the first path, position or token at which the two differ.
      ValueError: new_tokens without `greedy`, a module without precisions, or a config with them.
    """
    if new_tokens and greedy is None:
        raise ValueError(f"new_tokens={new_tokens} needs greedy=inference.generation.greedy")
    is_config = isinstance(model, Architecture)
    if is_config == (precisions is not None):
        got = "a config and precisions" if is_config else "a module without precisions"
        raise ValueError(f"got {got}, expected a config, or a module and the precisions of its linear layers")
    described: Any = model if precisions is None else precisions
    module: Any = model.module() if isinstance(model, Architecture) else model
    matrices = _prove_codes(described, latent["params"], packed.get("packed", {}))
    error, count = _prove_logits(module, latent, packed, inputs, mask, tolerance)
    identical = 0
    if new_tokens and greedy is not None:
        ours = np.asarray(greedy(model, packed, inputs, mask, new_tokens))
        theirs = np.asarray(greedy(model, latent, inputs, mask, new_tokens))
        if (ours != theirs).any():
            # Ordered by position: later differences in a row follow from its first one.
            position, row = np.argwhere((ours != theirs).T)[0]
            raise PackingError(
                f"greedy token {position} of prompt {row} is {ours[row, position]} packed and "
                f"{theirs[row, position]} latent ({(ours == theirs).sum()} of {ours.size} tokens agree)"
            )
        identical = ours.size
    return Proof(matrices, error, count, identical)


def _prove_codes(
    described: Architecture | Precisions, params: Mapping[str, Any], packed: Mapping[str, Any]
) -> int:
    flat, weights = flatten_dict(dict(params), sep="/"), flatten_dict(dict(packed), sep="/")
    expected = {
        f"{path}/weight": (path, layer) for path, layer in layers(described, flat).items() if layer.format
    }
    if weights.keys() != expected.keys():
        differing = sorted(weights.keys() ^ expected.keys())[0]
        state = "missing from" if differing in expected else "unexpected in"
        raise PackingError(
            f"{differing} is {state} the packed model; its config describes {len(expected)} matrices"
        )
    for name, weight in weights.items():
        path, layer = expected[name]
        if weight.format != layer.format:
            raise PackingError(f"{path}: the packed format is {weight.format}, expected {layer.format}")
        check_codes(path, weight, quantize(path, layer, flat))
    return len(weights)


def logits(module: nn.Module, variables: Variables, inputs: Array, mask: Array | None = None) -> Array:
    """What `prove` compares: the logits of a latent or packed model, compiled for each module.

    inputs, mask: see `prove`. Returns: [B, T, V] of a language model, [B, C] of a classifier.

    Raises:
      PackingError: the module returns neither an array nor something with the field `logits`.
    """
    try:
        hash(module)
    except TypeError:  # a field holds a list
        return jax.jit(functools.partial(_logits, module))(variables, inputs, mask)
    return _logits_of_hashable(module, variables, inputs, mask)


def _logits(module: nn.Module, variables: Variables, inputs: Array, mask: Array | None) -> Array:
    masked: dict[str, Any] = {} if mask is None else {"mask": mask}
    output: Any = module.apply(variables, inputs, **masked)
    output = getattr(output, "logits", output)
    if not isinstance(output, jax.Array):
        raise PackingError(
            f"got a {type(output).__name__} from {type(module).__name__}, expected logits: an array, or a field of "
            "that name"
        )
    return output


_logits_of_hashable = functools.partial(jax.jit, static_argnums=0)(_logits)


def _prove_logits(
    module: nn.Module, latent: Variables, packed: Variables, inputs: Any, mask: Any, tolerance: float
) -> tuple[float, int]:
    inputs = jnp.asarray(inputs)
    mask = None if mask is None else jnp.asarray(mask, bool)
    float_part = {name: part for name, part in latent.items() if name != "packed"}
    theirs = np.asarray(logits(module, float_part, inputs, mask))
    ours = np.asarray(logits(module, dict(packed), inputs, mask))
    return compare_logits(theirs, ours, mask, tolerance)


def compare_logits(
    theirs: Float[np.ndarray, "..."],
    ours: Float[np.ndarray, "..."],
    mask: Bool[Array, "B T"] | None = None,
    tolerance: float = LOGIT_TOLERANCE,
) -> tuple[float, int]:
    """The largest difference of a packed model's logits (`ours`), relative to the largest latent one (`theirs`).

    Returns: that difference, and the number of logits compared; those of padding are not.

    Raises:
      PackingError: the difference is beyond the tolerance, or latent logits are not finite.
    """
    if not np.isfinite(theirs).all():
        raise PackingError(
            "got NaN or infinite logits from the latent model, expected finite ones to compare"
        )
    # Padding is not compared; only a language model has a logit vector per token.
    if mask is not None and theirs.ndim == 3:
        theirs, ours = theirs[np.asarray(mask)], ours[np.asarray(mask)]
    difference = np.abs(ours - theirs)
    error = float(difference.max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))
    if not error <= tolerance:  # also when it is NaN
        where = np.unravel_index(np.nanargmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
        raise PackingError(
            f"logits differ by {error:.3g} of the largest, expected at most {tolerance:g}; the worst, at "
            f"index {[int(i) for i in where]}, is {ours[where]:.8g} packed and {theirs[where]:.8g} latent"
        )
    return error, theirs.size
