"""Numbers of a third-party config.json, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def shown(value: Any) -> str:
    """A value of a file for an error message, at most 80 characters of it."""
    return repr(value)[:80]


def integer(value: Callable[[str], Any], key: str) -> int:
    """`value(key)`, which must be a positive integer below 2^31. Raises ValueError, naming the key."""
    number = value(key)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**31:
        raise ValueError(f"config.json: {key} is {shown(number)}, expected a positive integer")
    return number


def positive(value: Callable[[str], Any], key: str) -> float:
    """`value(key)`, which must be a positive finite number. Raises ValueError, naming the key."""
    number = value(key)
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ValueError(f"config.json: {key} is {shown(number)}, expected a positive number")
    return float(number)


def boolean(value: Callable[[str], Any], key: str) -> bool:
    """`value(key)`, which must be true or false. Raises ValueError, naming the key."""
    found = value(key)
    if not isinstance(found, bool):
        raise ValueError(f"config.json: {key} is {shown(found)}, expected true or false")
    return found
