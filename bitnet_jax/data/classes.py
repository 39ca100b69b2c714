"""Labels and input preprocessing of a classifier, stored next to its weights.

classes.json   in a run folder (written by training) and in a packed folder (copied by `pack`)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.data.images import Pixels

CLASSES = "classes.json"


@dataclasses.dataclass(frozen=True)
class Classes:
    """Labels in the order of the logits, and the preprocessing of inputs."""

    task: str  # "images" or "text_classification"
    names: tuple[int | str, ...]
    pixels: Pixels | None = None  # only for images
    length: int | None = None  # only for texts: tokens, longer texts are truncated
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # section `data` of the run

    def __post_init__(self) -> None:
        names_fit = self.names and all(type(name) in (int, str) for name in self.names)
        if not names_fit or len(set(self.names)) != len(self.names):
            raise DataError(
                f"names: got {str(self.names)[:80]}, expected distinct integers or strings, at least one"
            )
        if (self.task, self.pixels is None, self.length is None) not in (
            ("images", False, True),
            ("text_classification", True, False),
        ):
            raise DataError(
                f"task: got {str(self.task)[:40]!r} with pixels {self.pixels} and length {self.length}, expected "
                "images with pixels, or text_classification with length"
            )
        if self.length is not None and (type(self.length) is not int or self.length < 1):
            raise DataError(f"length: got {str(self.length)[:40]}, expected a positive integer")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"data": dict(self.data)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Classes:
        """The inverse of `to_json`.

        Raises:
          DataError: another kind of file, or damaged.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{CLASSES}: got damaged JSON ({one_line(error)}), expected the file written by training"
            ) from error
        known = {field.name for field in dataclasses.fields(cls)}
        if (
            not isinstance(fields, dict)
            or fields.keys() != known
            or not isinstance(fields["names"], list)
            or not isinstance(fields["data"], dict)
        ):
            raise DataError(
                f"{CLASSES}: got other fields, expected {', '.join(sorted(known))} as written by training"
            )
        try:
            pixels = None if fields["pixels"] is None else _pixels(fields["pixels"])
            return cls(**fields | {"names": tuple(fields["names"]), "pixels": pixels})
        except (DataError, TypeError) as error:  # TypeError: a name that is a list or an object
            raise DataError(f"{CLASSES}: {one_line(error)}") from error


def _pixels(values: Any) -> Pixels:
    """Parse the JSON form of Pixels: [mean, deviation, [height, width]]."""
    numbers = values[:2] if isinstance(values, list) and len(values) == 3 else []
    size = values[2] if numbers else None
    if (
        not all(
            type(number) in (int, float) and abs(number) < 1e9 and math.isfinite(number) for number in numbers
        )
        or not numbers
        or not numbers[1] > 0
        or not isinstance(size, list)
        or len(size) != 2
        or not all(type(side) is int and 0 < side < 2**20 for side in size)
    ):
        raise DataError(f"pixels: got {str(values)[:80]}, expected [mean, deviation, [height, width]]")
    return Pixels(float(numbers[0]), float(numbers[1]), (size[0], size[1]))
