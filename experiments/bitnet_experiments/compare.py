"""Two studies side by side: their verdicts, and the arms that both of them have."""

from __future__ import annotations

from collections.abc import Sequence

from bitnet_experiments import verdicts
from bitnet_experiments.contrasts import Contrasts, welch
from bitnet_experiments.row_checks import comparable_rows
from bitnet_experiments.sections import markdown_table
from bitnet_experiments.study import Row, Study


def compare(first: Study, second: Study) -> str:
    """Markdown: question, verdict and effect of both; then every arm of one name or with runs of the same settings.

    The difference between the studies has Welch's interval: their seeds may not be common, nor their machines. It is
    too wide where a seed of both is the same run.

    Raises:
      ValueError: the studies compare different metrics.
    """
    if first.metric != second.metric:
        raise ValueError(
            f"got studies of {first.metric} and {second.metric}, expected one metric; "
            "compare studies with the same METRIC"
        )
    both, lines = (first, second), []
    rows = {study.name: comparable_rows(study) for study in both}
    for study in both:
        found = verdicts.judge(study, rows[study.name])
        effect = verdicts.effect(study, rows[study.name], found)
        lines.append([study.name, study.question, verdicts.label(study, found), effect])
    blocks = [markdown_table(["study", "<question", "<verdict", "<effect"], lines)]
    shared = []
    found = [Contrasts(study, rows[study.name]) for study in both]
    for arm, other in common(first, rows[first.name], second, rows[second.name]):
        apart = welch({"a": 1.0, "b": -1.0}, {"a": found[0].found[arm], "b": found[1].found[other]})
        names = [arm] if arm == other else [arm, other]
        shared.append([" / ".join(names), str(found[0].arm(arm)), str(found[1].arm(other)), str(apart)])
    if shared:
        header = [f"{first.metric} of arm", *(study.name for study in both), "difference"]
        blocks.append(markdown_table(header, shared))
    else:
        blocks.append("No arm is in both studies.")
    return "\n\n".join(blocks)


def common(first: Study, rows: Sequence[Row], second: Study, others: Sequence[Row]) -> list[tuple[str, str]]:
    """Pairs of finished arms (of the first, of the second) with one name, or with a run of one config."""

    def hashes(study: Study, rows: Sequence[Row]) -> dict[str, set[str]]:
        finished = [row for row in rows if row["status"] == "finished" and row["arm"] in study.arms]
        return {
            row["arm"]: {
                r["config_hash"] for r in finished if r["arm"] == row["arm"] and r.get("config_hash")
            }
            for row in finished
        }

    left, right = hashes(first, rows), hashes(second, others)
    return [(a, b) for a in left for b in right if a == b or left[a] & right[b]]
