"""What few bits in each layer of a model cost: bytes, from shapes, and harm, measured (conversion/sensitivity.py)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float, Int

from bitnet_jax.conversion.allocation import Frontier, Option
from bitnet_jax.conversion.blocks import Settings, linear_shapes
from bitnet_jax.conversion.calibration import Stream, embedded
from bitnet_jax.conversion.grids import GRIDS
from bitnet_jax.conversion.progress_folder import MeasuredBlocks
from bitnet_jax.conversion.sensitivity import FloatBlock, Harm, Probe, block_harms, divergence
from bitnet_jax.model_folders import LoadedModel
from bitnet_jax.models import ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.progress import progress_bar
from bitnet_jax.quantization.scales import Granularity

# Rows of tokens, each with the logits of the float model.
Reference = list[tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T V"]]]


def candidates(granularity: Granularity, activation: str, rotate: bool) -> dict[str, Settings]:
    """Grid -> settings: the finest grid of each packed format. Of grids with equal bytes it does the least harm."""
    finest = {}
    for grid in GRIDS:
        settings = Settings(
            grid=grid, method="gptq", granularity=granularity, activation=activation, rotate=rotate
        )
        finest[settings.precision.packed_format] = settings
    return {settings.grid: settings for settings in finest.values()}


class Bytes(NamedTuple):
    layers: dict[str, dict[str, int]]  # path -> grid -> bytes of the packed matrix and its scales
    others: int  # of tables, norms and biases, which the choice does not change

    def total(self, choice: Mapping[str, str]) -> int:
        return self.others + sum(self.layers[path][grid] for path, grid in choice.items())

    @property
    def least(self) -> int:
        return self.others + sum(min(its.values()) for its in self.layers.values())

    @property
    def most(self) -> int:
        return self.others + sum(max(its.values()) for its in self.layers.values())


def packed_bytes(configs: Mapping[str, ModelConfig]) -> Bytes:
    """configs: grid -> the model with this grid in all layers."""
    layers: dict[str, dict[str, int]] = {}
    others = 0
    for grid, config in configs.items():
        variables = packing.abstract(config)
        matrices = {
            path.removesuffix("/weight"): leaf.nbytes
            for path, leaf in flatten_dict(variables["packed"], sep="/").items()
            if path.startswith("layers_")
        }
        for path, nbytes in matrices.items():
            layers.setdefault(path, {})[grid] = nbytes
        others = packing.sizes(variables).total - sum(matrices.values())
    return Bytes(layers, others)


class LayerHarms(NamedTuple):
    """What a choice rests on."""

    settings: dict[str, Settings]  # by grid
    harms: dict[str, dict[str, Harm]]  # path -> grid -> harm
    bytes: Bytes
    other_kl: float  # to the float model, of what the choice does not change: rounded inputs and tables

    def frontier(self) -> Frontier:
        """The best choices of a grid for each layer; their bytes and harms are without `bytes.others`, `other_kl`."""
        return Frontier(
            {
                path: {grid: Option(self.bytes.layers[path][grid], harm.kl) for grid, harm in its.items()}
                for path, its in self.harms.items()
            }
        )

    def predicted_kl(self, choice: Mapping[str, str]) -> float:
        return self.other_kl + sum(self.harms[path][grid].kl for path, grid in choice.items())

    def settings_of(self, choice: Mapping[str, str]) -> Settings:
        """The most frequent grid for all layers, and those that have another one."""
        common = Counter(choice.values()).most_common(1)[0][0]
        others = {path: grid for path, grid in choice.items() if grid != common}
        return dataclasses.replace(self.settings[common], others=others)


def layer_harms(
    model: LoadedModel[ModelConfig],
    settings: Mapping[str, Settings],
    configs: Mapping[str, ModelConfig],
    tokens: Int[np.ndarray, "B T"],
    reference: Reference,
    finished: MeasuredBlocks,
    progress: bool,
) -> LayerHarms:
    """Measures block by block; those that are finished are read.

    Args:
      model: float.
      settings, configs: by grid, of `candidates`, and the model with each.
      tokens: the calibration text that layers are fitted on.
      reference: the text that harms are measured on.

    Raises:
      ValueError: weights or inputs with NaN, or logits that are not finite.
    """
    params, depth = model.variables["params"], model.config.num_layers
    config = next(iter(configs.values()))  # grids differ in weights only, which are float here
    blocks = [FloatBlock.of(params, layer, next(iter(settings.values()))) for layer in range(depth)]
    paths = [linear_shapes(params[f"layers_{layer}"]).keys() for layer in range(depth)]
    found = [finished.read(layer, paths[layer], settings) for layer in range(depth)]
    probed = np.stack([row for row, _ in reference])
    inputs = dataclasses.replace(next(iter(settings.values())).precision, activation="none")
    probe = Probe(dataclasses.replace(model.config, precision=inputs), params, blocks, probed)
    as_packed = Probe(config, params, blocks, probed).logits
    other_kl = float(np.mean([divergence(p, q) for (_, p), q in zip(reference, as_packed, strict=True)]))
    if not np.isfinite(other_kl):
        raise ValueError(
            "got NaN or infinite logits on the calibration text, expected finite ones to compare"
        )
    missing = [layer for layer in range(depth) if found[layer] is None]
    todo = len(settings) * sum(len(paths[layer]) for layer in missing)
    if missing:
        stream = Stream(config, embedded(config, params, tokens))
        with progress_bar(todo, unit="measurement", description="measuring layers", show=progress) as bar:
            for layer in range(missing[-1] + 1):
                if found[layer] is None:
                    harms = block_harms(probe, stream, settings, bar.update)
                    finished.write(layer, harms)
                    found[layer] = harms
                if layer < missing[-1]:
                    stream.advance(layer, blocks[layer].others, blocks[layer].weights)
                    probe.advance()
    harms = {
        f"layers_{layer}/{path}": its for layer in range(depth) for path, its in (found[layer] or {}).items()
    }
    return LayerHarms(dict(settings), harms, packed_bytes(configs), other_kl)
