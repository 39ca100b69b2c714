"""The linear layers of one block in few bits, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from bitnet_jax.conversion.calibration import Stream, Weights, stages
from bitnet_jax.conversion.fit import fitted_scale, nearest_codes
from bitnet_jax.conversion.gptq import (
    DAMPING,
    Rounded,
    compensate,
    inverse_factor,
    output_error,
    refitted,
    widened,
)
from bitnet_jax.conversion.grids import GRIDS
from bitnet_jax.models import ModelConfig
from bitnet_jax.quantization.input_transforms import hadamard
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import Rules
from bitnet_jax.quantization.scales import Granularity

Method = Literal["fit", "weighted", "gptq"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the linear layers of a model are converted."""

    grid: str = "ternary"  # a name in GRIDS
    granularity: Granularity = "channel"
    activation: str = "int16"
    # fit: least squares. weighted: squares times the second moment of each input. gptq: compensated, scales refitted.
    method: Method = "fit"
    rotate: bool = False  # inputs and weights in blocks by Hadamard matrices
    others: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # path of a layer -> its grid, if another

    @property
    def precision(self) -> Precision:
        """Of a layer with the grid `grid`."""
        return GRIDS[self.grid].precision(self.granularity, self.activation, self.rotate)

    @property
    def rules(self) -> Rules:
        """The precision of a model that is converted so."""
        own = ((path, self.of(path).precision) for path in self.others)
        return (*own, ("*", self.precision)) if self.others else self.precision

    def of(self, path: str) -> Settings:
        """Those of one layer, without the others."""
        return dataclasses.replace(self, grid=self.others.get(path, self.grid), others={})

    @property
    def calibrated(self) -> bool:
        return self.method != "fit"


class Report(NamedTuple):
    """What became of one matrix."""

    error: float  # of the output, relative to it; of the weights without calibration text
    zeros: float  # fraction of the codes
    damping: float | None  # of the second moment, where it is inverted


def rounded_layer(
    w: Float[np.ndarray, "n k"],
    settings: Settings,
    moment: Float[np.ndarray, "k k"] | None = None,
    factor: Float[np.ndarray, "k k"] | None = None,
) -> Rounded:
    """Codes and scales of one matrix.

    Args:
      moment: of its inputs, for the methods that are calibrated.
      factor: of the moment (gptq.inverse_factor), for the method gptq.
    """
    grid, granularity, k = GRIDS[settings.grid], settings.granularity, w.shape[1]
    if factor is not None:
        assert moment is not None
        return refitted(w, compensate(w, factor, grid, granularity), moment)
    importance = np.ones(k) if moment is None else np.diag(moment) + DAMPING * np.trace(moment) / k
    scale = fitted_scale(w, importance, grid, granularity)
    return Rounded(nearest_codes(w, widened(scale, k), grid), scale)


def linear_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Path -> (outputs, inputs) of each linear layer of a block."""
    return {path: weight.shape for path, weight in split(params)[0].items()}


def convert_block(
    config: ModelConfig, params: Mapping[str, Any], layer: int, settings: Settings, stream: Stream | None
) -> tuple[dict[str, Rounded], dict[str, Report]]:
    """Codes and scales of the linear layers of one block, by path.

    Args:
      config: of the converted model, whose linear layers have the precisions `settings.rules`.
      params: of the block, float.
      layer: its index.
      stream: the calibration text before this block, for settings that need it.

    Raises:
      ValueError: a matrix or the calibration text has NaN, or every code of a matrix became 0; the message names it.
    """
    weights, others = split(params)
    done: dict[str, Rounded] = {}
    reports: dict[str, Report] = {}
    for stage in stages(config):
        moment = factor = damping = None
        if stream is not None:
            values = {path: rounded.dequantized() for path, rounded in done.items()}
            moment = finite_moment(stream, layer, others, values, stage[0])
            if settings.method == "gptq":
                factor, damping = inverse_factor(moment)
        for path in stage:
            name = f"layers_{layer}/{path}"
            w = matrix(name, weights[path], settings.rotate)
            done[path] = rounded_layer(w, settings.of(name), moment, factor)
            if not done[path].codes.any():
                raise ValueError(
                    f"{name}: every code became 0 (the largest weight is {np.abs(w).max():.3g}), "
                    "expected some that are not; is the layer used?"
                )
            error = output_error(w, done[path].dequantized(), moment)
            reports[path] = Report(error, float(np.mean(done[path].codes == 0)), damping)
    return done, reports


def matrix(name: str, weight: Any, rotate: bool) -> Float[np.ndarray, "n k"]:
    """The float weights of a layer as they are rounded. Raises ValueError: they have NaN or infinity."""
    w = np.asarray(weight, np.float32)
    if not np.isfinite(w).all():
        raise ValueError(f"{name}: got weights with NaN or infinity, expected finite ones")
    return np.asarray(hadamard(jnp.asarray(w), block=True)) if rotate else w


def finite_moment(
    stream: Stream, layer: int, others: Mapping[str, Any], weights: Weights, path: str
) -> Float[np.ndarray, "k k"]:
    """`Stream.moment`. Raises ValueError: it has NaN or infinity."""
    moment = stream.moment(layer, others, weights, path)
    if not np.isfinite(moment).all():
        raise ValueError(
            f"layers_{layer}/{path}: got NaN or infinite inputs on the calibration text, expected finite ones"
        )
    return moment


def advance(stream: Stream, params: Mapping[str, Any], layer: int, block: Mapping[str, Rounded]) -> None:
    """Runs the calibration text through a converted block."""
    stream.advance(layer, split(params)[1], {path: rounded.dequantized() for path, rounded in block.items()})


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Path -> matrix of each linear layer of a block, and the nested parameters that are no matrices of one."""
    flat = flatten_dict(dict(params), sep="/")
    weights = {path.removesuffix("/weight"): w for path, w in flat.items() if path.endswith("/weight")}
    others = {path: leaf for path, leaf in flat.items() if not path.endswith("/weight")}
    return weights, unflatten_dict(others, sep="/")
