"""The verdict of a study, computed from its claims and its rows, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bitnet_experiments.claims import OUTCOMES, Claim, verdict
from bitnet_experiments.contrasts import Contrasts
from bitnet_experiments.intervals import Estimate, Range
from bitnet_experiments.sections import markdown_table
from bitnet_experiments.study import Row, Study


class Finding(NamedTuple):
    claim: Claim
    effect: Estimate | Range | None
    outcome: str  # one of claims.OUTCOMES


class Verdict(NamedTuple):
    name: str  # one of claims.VERDICTS
    findings: tuple[Finding, ...]


def judge(study: Study, rows: Sequence[Row]) -> Verdict:
    """Every claim against the rows, and what follows for the study."""
    findings = []
    for claim in study.claims:
        if claim.contrast is not None:
            effect = Contrasts(study, rows, claim.metric).difference(*claim.contrast)
        else:
            assert claim.measure is not None
            effect = claim.measure(study, rows)
        findings.append(Finding(claim, effect, claim.outcome(effect)))
    name = verdict([finding.outcome for finding in findings], cannot_show=bool(study.cannot_show))
    return Verdict(name if rows else "open", tuple(findings))


def analogue(study: Study) -> bool:
    return study.task != study.source_task


def label(study: Study, found: Verdict) -> str:
    """The verdict with what limits it, for one cell of a table."""
    limits = ["analogue"] if analogue(study) and found.findings else []
    limits += ["to be measured again"] if study.redo else []
    return f"{found.name} ({', '.join(limits)})" if limits else found.name


def effect(study: Study, rows: Sequence[Row], found: Verdict) -> str:
    """The study's answer as a short text: its EFFECT, else the effect of the first claim."""
    if callable(study.effect):
        return study.effect(study, rows) if rows else ""
    if study.effect:
        estimate = Contrasts(study, rows).difference(study.effect, study.baseline)
        return "" if estimate is None else f"{study.effect} minus {study.baseline}: {estimate}"
    if not found.findings or found.findings[0].effect is None:
        return ""
    first = found.findings[0]
    name = " minus ".join(first.claim.contrast) if first.claim.contrast else first.claim.says
    return f"{name}: {first.effect}"


def markdown(study: Study, found: Verdict) -> str:
    """What a page begins with: what the study cannot show, the verdict, and every claim with its rule and outcome."""
    blocks = []
    if study.cannot_show:
        blocks.append(f"**This study cannot show the effect.** {study.cannot_show}")
    number = len(found.findings)
    counts = [sum(finding.outcome == outcome for finding in found.findings) for outcome in OUTCOMES]
    words = ("holds", "of another size", "contradicted", "undecided")
    counted = ", ".join(f"{count} {word}" for count, word in zip(counts, words, strict=True) if count)
    counted = counted.replace("holds", "hold") if counts[0] > 1 else counted
    claims = f"Of {number} claims: {counted}." if number > 1 else f"One claim: {counted[2:]}."
    text = f"**Verdict: {found.name}.** "
    text += claims if found.findings else "The source states nothing that this study could test."
    if analogue(study):
        text += f" An analogue: {study.task} here, {study.source_task} in the source."
    blocks.append(f"{text} [Rules](../../README.md#verdicts).")
    if study.redo:
        blocks.append(f"**To be measured again:** {study.redo}.")
    if found.findings:
        lines = [
            [claim.says, claim.rule, str(effect) if effect is not None else "not measured", outcome]
            for claim, effect, outcome in found.findings
        ]
        blocks.append(
            markdown_table(["claim of the source", "<agrees if", "<effect here", "<outcome"], lines)
        )
    return "\n\n".join(blocks)


def to_json(study: Study, found: Verdict) -> dict[str, Any]:
    """The content of verdict.json; numbers have six significant digits."""
    return {
        "study": study.name,
        "verdict": found.name,
        "analogue": analogue(study),
        "redo": study.redo or None,
        "cannot_show": study.cannot_show or None,
        "claims": [
            {
                "claim": claim.says,
                "contrast": list(claim.contrast) if claim.contrast else None,
                "metric": claim.metric or study.metric if claim.contrast else None,
                "agrees_if": claim.rule,
                "effect": _number(effect.mean) if effect is not None else None,
                "low": _number(effect.low) if effect is not None else None,
                "high": _number(effect.high) if effect is not None else None,
                "interval": effect.method if isinstance(effect, Estimate) else None,
                "outcome": outcome,
            }
            for claim, effect, outcome in found.findings
        ],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")
