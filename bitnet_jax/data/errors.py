"""The error of this package: unusable text, tokens, files or options."""

from __future__ import annotations


class DataError(ValueError):
    """Unusable data. The message is one line: got, expected, what to do."""


def one_line(error: BaseException) -> str:
    """The first line of another library's message, truncated to fit inside ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def check_number(name: str, value: int | None, least: int = 1) -> None:
    """Raise DataError if an option of section `data` is below `least`; None means not set."""
    if value is not None and value < least:
        raise DataError(f"{name}: got {value}, expected at least {least}; correct data.{name}")


def check_share(name: str, value: float) -> None:
    """Raise DataError if an option of section `data` is not strictly between 0 and 1."""
    if not 0 < value < 1:
        raise DataError(f"{name}: got {value}, expected a number between 0 and 1, such as 0.05")
