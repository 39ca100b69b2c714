"""Sections of settings: checked types, plain values, flat names."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from bitnet_jax.names import check_name


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def section_of(section: str, kind: type, fields: Mapping[str, Any]) -> Any:
    """The dataclass `kind` with these fields. Raises ValueError: an unknown field or a wrong type."""
    expected = typing.get_type_hints(kind)
    for name, value in fields.items():
        check_name(f"field of {section}", name, expected)
        if not is_a(value, expected[name]):
            wanted = getattr(expected[name], "__name__", str(expected[name]))
            raise ValueError(f"{section}.{name}: got {value!r}, expected {wanted}")
    return kind(**{name: float(v) if expected[name] is float else v for name, v in fields.items()})


def is_a(value: Any, expected: Any) -> bool:
    """Whether a value has a type as written in a section; an integer is a float, a bool is no number."""
    if typing.get_origin(expected) is Mapping:
        inner = typing.get_args(expected)
        return isinstance(value, Mapping) and all(
            is_a(part, kind) for item in value.items() for part, kind in zip(item, inner, strict=True)
        )
    if typing.get_origin(expected) is list:
        return isinstance(value, list) and all(is_a(part, *typing.get_args(expected)) for part in value)
    if isinstance(expected, types.UnionType):
        return any(is_a(value, kind) for kind in typing.get_args(expected))
    if expected is float:
        largest = sys.float_info.max  # excludes NaN, infinities and integers too large for a float
        return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) <= largest
    return isinstance(value, expected) and (expected is bool or not isinstance(value, bool))


def plain(value: Any) -> Any:
    """Dicts, lists and scalars of nested mappings, sequences and dataclasses."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return value
