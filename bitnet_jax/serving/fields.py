"""The fields of a request's JSON body: each is taken once, with its type and range; an unused one is an error.

Servers that accept fields they ignore give answers that are not what was asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any

SHOWN = 60  # characters of a bad value in a message


class ApiError(Exception):
    """An error answer, in the shape of OpenAI's: an HTTP status, a type, and what to do."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse_body(body: bytes) -> Fields:
    """Raises ApiError: not UTF-8, not JSON, nested too deeply, NaN or infinity, or not an object."""

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(f"the body is not valid JSON in UTF-8 ({reason[:200]})") from error
    if not isinstance(value, dict):
        raise ApiError(f"the body is {_shown(value)}, expected a JSON object")
    return Fields(value)


class Fields:
    """The fields of a JSON object. null counts as absent, as clients send it for what was not set."""

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._within = within

    def take(self, name: str, default: Any = None) -> Any:
        return self._values.pop(name, default)

    def look(self, name: str, default: Any = None) -> Any:
        """The value of a field that is still to be taken."""
        return self._values.get(name, default)

    def wrong(self, name: str, got: Any, expected: str) -> ApiError:
        name = self._within + name
        return ApiError(f"{name}: got {_shown(got)}, expected {expected}", param=name)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, value, f"a number from {low} to {high}")
        if not (math.isfinite(value) and low <= value <= high):
            raise self.wrong(name, value, f"a number from {low} to {high}")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def identifier(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not re.fullmatch("[A-Za-z0-9_-]{1,64}", value):
            raise self.wrong(name, value, "1 to 64 letters, digits, underscores or hyphens")
        return value

    def only(self, name: str, neutral: Collection[Any]) -> None:
        """A field that the server does not support: only values that ask for nothing are accepted."""
        value = self.take(name)
        same = [one for one in neutral if one == value and isinstance(one, bool) == isinstance(value, bool)]
        if value is not None and not same:
            name = self._within + name
            raise ApiError(f"{name}: not supported by this server; leave it out", param=name)

    def done(self) -> None:
        """Raises ApiError for a field that was not taken."""
        if self._values:
            name = self._within + next(iter(self._values))
            raise ApiError(f"{name[:SHOWN]}: unknown or unsupported field; leave it out", param=name[:SHOWN])


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
