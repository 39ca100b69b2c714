"""Outcomes of claims, and verdicts."""

from __future__ import annotations

from typing import Any

import pytest

from bitnet_experiments.claims import Claim, verdict
from bitnet_experiments.intervals import Estimate, Range


def around(mean: float, half: float) -> Estimate:
    """An estimate with this 95 % interval; its 90 % interval has 0.839 of the width."""
    return Estimate(mean, half / 1.959964, 1e9)


@pytest.mark.parametrize(
    ("rule", "effect", "outcome"),
    [
        ({"less_than": 0}, around(-0.2, 0.1), "holds"),
        ({"less_than": 0}, around(-0.05, 0.1), "undecided"),
        ({"less_than": 0}, around(0.2, 0.1), "contradicted"),
        ({"greater_than": 0.5}, around(0.7, 0.1), "holds"),
        ({"greater_than": 0.5}, Range(0.0, 0.0, 0.4), "contradicted"),
        ({"between": (0.09, 0.11)}, around(0.105, 0.04), "holds"),
        ({"between": (0.09, 0.11)}, around(0.1208, 0.007), "other size"),
        ({"between": (0.09, 0.11)}, around(0.05, 0.1), "undecided"),
        ({"between": (0.09, 0.11)}, around(0.01, 0.05), "contradicted"),
        ({"between": (0.09, 0.11)}, around(-0.2, 0.1), "contradicted"),
        ({"between": (-0.02, -0.02)}, around(-0.03, 0.02), "holds"),
        ({"between": (-0.02, -0.02)}, around(-0.1, 0.02), "other size"),
        ({"between": (0, 0.01)}, around(0.005, 0.02), "undecided"),
        ({"between": (0, 0.01)}, around(0.005, 0.004), "holds"),
        ({"equivalent": 0.1}, around(0.0, 0.11), "holds"),
        ({"equivalent": 0.1}, around(0.05, 0.08), "undecided"),
        ({"equivalent": 0.1}, around(0.3, 0.08), "contradicted"),
        ({"less_than": 0}, Estimate(-1.0, float("nan"), float("nan")), "undecided"),
        ({"less_than": 0}, None, "undecided"),
    ],
)
def test_the_outcome_follows_from_the_interval(rule: dict[str, Any], effect: Any, outcome: str) -> None:
    assert Claim(says="x", contrast=("a", "b"), **rule).outcome(effect) == outcome


@pytest.mark.parametrize(
    ("outcomes", "name"),
    [
        ([], "own finding"),
        (["holds", "holds"], "reproduced"),
        (["holds", "undecided"], "partly"),
        (["other size"], "partly"),
        (["contradicted", "other size"], "partly"),
        (["contradicted", "undecided"], "not at this size"),
        (["undecided"], "open"),
    ],
)
def test_the_verdict_follows_from_the_outcomes(outcomes: list[str], name: str) -> None:
    assert verdict(outcomes) == name
    assert verdict(outcomes, cannot_show=True) == ("open" if outcomes else name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contrast": ("a", "b")}, "give exactly one"),
        ({"contrast": ("a", "b"), "less_than": 0, "greater_than": 1}, "give exactly one"),
        ({"less_than": 0}, "either a contrast or a measure"),
        ({"contrast": ("a", "b"), "between": (1, 0)}, "swap them"),
        ({"contrast": ("a", "b"), "equivalent": 0.0}, "positive margin"),
    ],
)
def test_claims_that_cannot_be_judged_are_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Claim(says="x", **fields)
