"""The grids of few-bit weights: their levels, and the Precision of layers that hold them.

Scales are fitted, not measured on latent weights, so the Precision has learned ones: codes times scale are latent
weights that quantize to exactly these codes and scales, in training, packing and its proof.
"""

from __future__ import annotations

import dataclasses

from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.scales import Granularity


@dataclasses.dataclass(frozen=True)
class Grid:
    """Levels +-m for each m of `magnitudes`, ascending."""

    magnitudes: tuple[int, ...]
    weight: str  # the quantizer whose codes these are
    weight_options: tuple[tuple[str, str], ...] = ()

    def precision(self, granularity: Granularity, activation: str, rotate: bool = False) -> Precision:
        """Of a layer with such weights. rotate: its input is rotated in blocks, and so must be its weights."""
        return Precision(
            weight=self.weight,
            weight_options=self.weight_options,
            scale="learned",
            granularity=granularity,
            activation=activation,
            hadamard="block" if rotate else False,
        )


# Without a level at 0, an even number of levels is symmetric; 4 bits would then need codes beyond the format int4.
GRIDS: dict[str, Grid] = {
    "binary": Grid((1,), "binary"),
    "ternary": Grid((0, 1), "ternary_absmean"),
    "2": Grid((1, 3), "int2"),
    "3": Grid((1, 3, 5, 7), "int3", (("levels", "midrise"),)),
    "4": Grid(tuple(range(8)), "int4"),
    "8": Grid(tuple(range(128)), "int8"),
}
