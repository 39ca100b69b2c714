"""The one error of this package: text, tokens or files that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Unusable data. The message is one line: what was got, what was expected, what to do."""


def one_line(error: BaseException) -> str:
    """The first line of another library's message, short enough to stand inside ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
