"""Claims about effects, and what an interval says about them: the verdict of a study is computed from its claims.

A claim states which effects agree with it, in the units of the metric:

    less_than, greater_than   a direction, or an inequality with a threshold
    between                   a size: the range that the source gives; one number is a range without width
    equivalent                no difference: the effect is within this margin of 0

The outcome of a claim, from the 95 % interval of the measured effect:

    holds         all of the interval agrees with an inequality; or it meets the range of a size, which excludes 0, and
                  excludes 0 on the same side; or it is inside a range that contains 0; or two one-sided tests at 5 %
                  place the effect within the margin
    other size    a size whose range the interval misses, but on the same side of 0
    contradicted  none of the interval agrees
    undecided     otherwise: the runs do not resolve the question
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitnet_experiments.intervals import Estimate, Range

OUTCOMES = ("holds", "other size", "contradicted", "undecided")
VERDICTS = ("reproduced", "partly", "not at this size", "open", "own finding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of the source, the effect that tests it, and the effects that agree with it.

    Attributes:
      says: the statement, one line, with the source's figures.
      contrast: (arm, other): the effect is arm minus other in `metric`, by default the study's.
      measure: (study, rows) -> the effect instead; None if it cannot be computed.
      less_than, greater_than, between, equivalent: exactly one, see above.

    Raises:
      ValueError: not exactly one effect and one rule, a range from high to low, or a margin that is not positive.
    """

    says: str
    contrast: tuple[str, str] | None = None
    metric: str | None = None
    measure: Callable[[Any, Sequence[Mapping[str, Any]]], Estimate | Range | None] | None = None
    less_than: float | None = None
    greater_than: float | None = None
    between: tuple[float, float] | None = None
    equivalent: float | None = None

    def __post_init__(self) -> None:
        rules = [self.less_than, self.greater_than, self.between, self.equivalent]
        if sum(rule is not None for rule in rules) != 1:
            raise ValueError(
                f"{self.says}: expected one of less_than, greater_than, between, equivalent; give exactly one"
            )
        if (self.contrast is None) == (self.measure is None):
            raise ValueError(f"{self.says}: expected either a contrast or a measure; give exactly one")
        if self.between is not None and not self.between[0] <= self.between[1]:
            raise ValueError(f"{self.says}: got between={self.between}, expected (low, high); swap them")
        if self.equivalent is not None and not self.equivalent > 0:
            raise ValueError(f"{self.says}: got equivalent={self.equivalent}, expected a positive margin")

    @property
    def rule(self) -> str:
        if self.less_than is not None:
            return f"below {self.less_than:g}"
        if self.greater_than is not None:
            return f"above {self.greater_than:g}"
        if self.between is not None:
            low, high = self.between
            return f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return f"within ±{self.equivalent:g}"

    def outcome(self, effect: Estimate | Range | None) -> str:
        """One of OUTCOMES."""
        if effect is None or math.isnan(effect.low):
            return "undecided"
        low, high = effect.low, effect.high
        if self.less_than is not None:
            return _side(high < self.less_than, low > self.less_than)
        if self.greater_than is not None:
            return _side(low > self.greater_than, high < self.greater_than)
        if self.equivalent is not None:
            margin = self.equivalent
            inside = isinstance(effect, Estimate) and effect.within(margin)
            return _side(inside, low > margin or high < -margin)
        assert self.between is not None
        first, last = self.between
        misses = high < first or low > last
        if first <= 0 <= last:
            return _side(first <= low and high <= last, misses)
        same_side = low > 0 if first > 0 else high < 0
        if same_side:
            return "other size" if misses else "holds"
        return "contradicted" if misses else "undecided"


def _side(agrees: bool, disagrees: bool) -> str:
    return "holds" if agrees else "contradicted" if disagrees else "undecided"


def verdict(outcomes: Sequence[str], cannot_show: bool = False) -> str:
    """One of VERDICTS from the outcomes of a study's claims; the rule is in experiments/README.md.

    Args:
      cannot_show: the study says that its model or task cannot show the effect.
    """
    if not outcomes:
        return "own finding"
    if cannot_show or set(outcomes) == {"undecided"}:
        return "open"
    if set(outcomes) == {"holds"}:
        return "reproduced"
    return "partly" if {"holds", "other size"} & set(outcomes) else "not at this size"
