"""Validation of names against the existing or expected ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Set
from typing import Any

MOST_LISTED = 20  # the fields of a model are about 40


def suggestion(got: Any, allowed: Iterable[str]) -> str:
    """`; did you mean 'name'?` with the nearest allowed name, for the end of a message; "" if none is near."""
    near = difflib.get_close_matches(str(got), list(allowed), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_name(what: str, got: Any, allowed: Iterable[str], also: str = "") -> None:
    """Checks that `got` is one of `allowed`.

    Args:
      what: the setting that holds the name, for the message.
      also: other allowed values, for the message, such as " or a positive group size".
    Raises:
      ValueError: `got` is not allowed; the message lists the names and suggests the nearest one. More than
        MOST_LISTED names are only counted if one of them is near.
    """
    allowed = list(allowed)
    if got not in allowed:
        hint = suggestion(got, allowed)
        listed = (
            f"{len(allowed)} names" if hint and len(allowed) > MOST_LISTED else ", ".join(allowed) or "none"
        )
        raise ValueError(f"{what}: got {repr(got)[:80]}, expected one of {listed}{also}{hint}")


def unmatched(wanted: Set[str], found: Set[str]) -> str:
    """`2 missing (first a), 1 unexpected (first b)` for a message; "" if both have the same names."""
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    parts = (("missing", missing), ("unexpected", extra))
    listed = (f"{len(names)} {what}" + (f" (first {names[0]})" if names else "") for what, names in parts)
    return ", ".join(listed) if missing or extra else ""
