"""Names are validated in one place, with one form of message."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_jax.names import check_name, suggestion


def test_an_unknown_name_is_one_line_with_the_names_and_the_nearest() -> None:
    check_name("colour", "red", ("red", "green"))
    message = "^colour: got 'gren', expected one of red, green or a number; did you mean 'green'[?]$"
    with pytest.raises(ValueError, match=message):
        check_name("colour", "gren", ("red", "green"), also=" or a number")
    with pytest.raises(ValueError, match="^colour: got 'zzz', expected one of red, green$"):
        check_name("colour", "zzz", iter(("red", "green")))
    with pytest.raises(ValueError, match="^colour: got 3, expected one of none$"):
        check_name("colour", 3, ())


def test_a_long_list_does_not_bury_the_suggestion() -> None:
    many = [f"{letter}_option" for letter in "abcdefghijklmnopqrstu"]
    with pytest.raises(
        ValueError, match="^x: got 'a_optoin', expected one of 21 names; did you mean 'a_option'[?]$"
    ):
        check_name("x", "a_optoin", many)
    with pytest.raises(ValueError, match="^x: got '!', expected one of a_option, b_option, .*, u_option$"):
        check_name("x", "!", many)


def test_nothing_is_suggested_without_a_near_name() -> None:
    assert suggestion("train", {"train": 1, "bench": 2}) == "; did you mean 'train'?"
    assert suggestion("zzz", ["train"]) == ""


def test_no_other_module_looks_for_near_names(repository: Path) -> None:
    folders = ("bitnet_jax", "experiments", "kernels/bitnet_kernels")
    files = [file for folder in folders for file in (repository / folder).rglob("*.py")]
    users = [file.name for file in files if "difflib" in file.read_text(encoding="utf-8")]
    assert users == ["names.py"]
