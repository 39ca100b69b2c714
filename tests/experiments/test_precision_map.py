"""The map of the best bits: its cells, table and figure; and the files that its study compares have one size."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import pytest

from bitnet_experiments.precision_map import Place, cells, map_figure, map_table
from bitnet_experiments.runs import sizes
from bitnet_experiments.study import Study, load_study

LOSSES = {("64", "1", "1"): 2.4, ("64", "1", "4"): 2.2, ("64", "1", "8"): 2.2003, ("64", "4", "1"): 2.0}
BYTES = {"64": 65536, "128": 131072}


def place(arm: str) -> Place:
    file, text, bits = arm.split()
    return Place(BYTES[file], int(text) * 2**20, float(bits))


def made(study: Study) -> tuple[Study, list[dict[str, object]]]:
    arms = {" ".join(key): {} for key in [*LOSSES, ("64", "4", "8"), ("128", "1", "1"), ("128", "1", "8")]}
    own = dataclasses.replace(study, arms=arms, baseline=next(iter(arms)), effect="", small_arms=None)
    rows: list[dict[str, object]] = [
        {"run": f"{arm}-{seed}", "arm": " ".join(arm), "seed": seed, "status": "finished",
         "valid_loss": loss + 0.001 * (-1) ** (seed + int(arm[2]) // 4)}
        for arm, loss in LOSSES.items()
        for seed in range(4)
    ]  # fmt: skip
    return own, rows


def test_a_cell_has_its_best_bits_and_those_not_told_from_them(study: Study) -> None:
    own, rows = made(study)
    found = cells(own, rows, place)
    assert list(found) == [(65536, 2**20)]  # the others have one arm or none
    cell = found[65536, 2**20]
    assert cell.best == 4
    assert cell.equal == [8]
    assert cell.above[1].mean == pytest.approx(0.2)
    assert cell.profile[1] == (4, 0, 0)


def test_table_and_figure(study: Study) -> None:
    own, rows = made(study)
    lines = map_table(place)(own, rows).markdown.splitlines()
    assert lines[0] == "| file | text | 1 bits | 4 bits | 8 bits | not told from the best |"
    assert lines[2].startswith("| 64 KiB | 1 MiB | 2.4000")
    assert "| **2.2000" in lines[2]
    assert lines[2].endswith("| 8 |")
    section = map_figure("map", place)(own, rows)
    assert [point[0] for point in section.plotted["65536 1048576"]] == [1, 4, 8]
    assert section.draw is not None
    section.draw(plt.figure().subplots())
    assert map_figure("map", place)(own, []).figure is None
    assert map_table(place)(own, []).markdown == ""


@pytest.mark.extended
def test_the_models_of_bytes_and_compute_fill_files_of_one_size() -> None:
    study = load_study("bytes_and_compute")
    budgets = {"64K": 2**16, "128K": 2**17, "256K": 2**18}
    models = {tuple(arm.split()[::2]): arm for arm in study.arms}
    assert {file for file, _ in models} == set(budgets)
    for (file, bits), arm in models.items():
        config = study.settings(arm, 0, overrides={"optimizer.learning_rate": 0.004})
        found = sizes(config.model_config(256))
        assert 0.985 < found["model_bytes"] / budgets[file] <= 1, arm
        assert found["weight_bits"] == pytest.approx(float(bits[1:]), abs=0.01)
