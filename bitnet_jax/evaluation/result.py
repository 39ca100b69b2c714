"""The result of a task: metrics with confidence intervals, baselines and details."""

from __future__ import annotations

import dataclasses
from typing import Any

from bitnet_jax.evaluation.intervals import Estimate


@dataclasses.dataclass(frozen=True)
class Result:
    examples: int
    metrics: dict[str, Estimate]
    baselines: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # without a model: chance, majority, ...
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Plain values for JSON: each metric and its interval, baselines, details."""
        metrics = {
            name: {"value": estimate.value, "interval_95": [estimate.low, estimate.high]}
            for name, estimate in self.metrics.items()
        }
        return {
            "examples": self.examples,
            "metrics": metrics,
            "baselines": self.baselines,
            "details": self.details,
        }
