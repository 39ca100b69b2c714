"""Rotary frequencies of models extended to longer texts than they were first trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

KINDS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Changed frequencies `f` (radians per position). With w = original_length f / 2π, the turns of a channel pair over
    the original length:

        linear   f / factor                                             position interpolation, 2306.15595
        llama3   f if w > high; f / factor if w < low; between, linear in w                           2407.21783
        yarn     f for w > beta_fast; f / factor for w < beta_slow; between, linear in the channel    2309.00071

    YaRN also multiplies rotated queries and keys by `magnitude`.

    Raises:
      ValueError: an unknown kind, a missing original_length, or a value out of range.
    """

    kind: str
    factor: float
    original_length: int | None = None  # positions before the extension; llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the bounds of the channels outwards to whole channels
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope_scaling.kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ):
            value = getattr(self, name)
            if name == "attention_factor" and value is None:
                continue
            least = 1 if name == "factor" else 0
            if type(value) not in (int, float) or not least <= value < 1e30 or value == 0:
                expected = "a number of at least 1" if least else "a positive number"
                raise ValueError(f"rope_scaling.{name}: got {value!r}, expected {expected}")
        if type(self.truncate) is not bool:
            raise ValueError(f"rope_scaling.truncate: got {self.truncate!r}, expected true or false")
        length = self.original_length
        if not (type(length) is int and 0 < length < 2**31) and (length is not None or self.kind != "linear"):
            raise ValueError(f"rope_scaling.original_length: got {length!r}, expected a positive integer")
        if not (self.low_freq_factor < self.high_freq_factor and self.beta_slow <= self.beta_fast):
            raise ValueError(
                f"rope_scaling: got low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}, "
                f"beta_slow={self.beta_slow}, beta_fast={self.beta_fast}, expected low < high and slow <= fast"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """The inverse of dataclasses.asdict. Raises ValueError for an unknown or missing field."""
        names = [field.name for field in dataclasses.fields(cls)]
        wrong = [name for name in values if name not in names]
        if wrong or not {"kind", "factor"} <= values.keys():
            raise ValueError(
                f"rope_scaling: got {', '.join(map(str, values)) or 'nothing'}, expected kind, factor and any of "
                f"{', '.join(names[2:])}"
            )
        return cls(**values)

    @property
    def magnitude(self) -> float:
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The changed frequencies of the h/2 channel pairs, float64.

        Args:
          frequencies: `theta^(-2i/h)`, float64.
        """
        slow = frequencies / self.factor
        if self.kind == "linear":
            return slow
        assert self.original_length is not None
        kept: np.ndarray
        if self.kind == "llama3":
            turns = self.original_length * frequencies / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            # The channel that makes a given number of turns, clipped to the head as in the library of the paper.
            size = 2 * len(frequencies)
            low, high = (
                size * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
                for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, size - 1)
            high += 0.001 if low == high else 0
            kept = 1 - (np.arange(len(frequencies)) - low) / (high - low)
        share = np.clip(kept, 0, 1)
        return share * frequencies + (1 - share) * slow
