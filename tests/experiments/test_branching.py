"""Runs that begin with a shorter run's updates equal those trained from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_experiments.branching import train_longer
from bitnet_experiments.runs import train
from bitnet_experiments.study import Study, overridden
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.load import load_run


def lasting(study: Study, steps: int, **changes: object) -> RunConfig:
    wsd = {
        "optimizer.schedule": "wsd",
        "optimizer.decay_share": 0.5,
        "training.steps": steps,
        "training.checkpoint_every": steps // 2,
        "training.eval_every": steps,
    }
    fields = study.settings("ternary", 0).to_dict()
    return RunConfig.from_dict(
        overridden(fields, wsd | {n.replace("__", "."): v for n, v in changes.items()})
    )


def test_a_branch_equals_a_run_from_scratch(study: Study, tmp_path: Path) -> None:
    two, four, eight = (lasting(study, steps) for steps in (2, 4, 8))
    whole = train(eight, tmp_path / "whole")
    shorter = train(two, tmp_path / "2")
    assert train_longer(two, tmp_path / "2", four, tmp_path / "4")["step"] == 4
    row = train_longer(four, tmp_path / "4", eight, tmp_path / "8")
    for name in row.keys() - {"training_seconds", "mfu"}:
        assert row[name] == whole[name], name
    for mine, theirs in zip(
        *(jax.tree.leaves(load_run(tmp_path / run)[2]) for run in ("8", "whole")), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("8", "whole")
    ]
    assert losses[0] == losses[1]
    assert train(two, tmp_path / "2") == shorter  # left as it was
    assert train_longer(four, tmp_path / "4", eight, tmp_path / "8") == row  # read again


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"seed": 1}, "got runs that differ in seed"),
        ({"optimizer__schedule": "cosine"}, {"optimizer__schedule": "cosine"}, "expected 'wsd'"),
        (
            {"optimizer__weight_decay_until": 0.2},
            {"optimizer__weight_decay_until": 0.2},
            "weight_decay: got values that differ before step 2",
        ),
        ({"training__checkpoint_every": 3}, {}, "expected one at 2"),
        *(
            ({"model__precision": precision}, {"model__precision": precision}, "the gradient 'tanh'")
            for precision in (
                {"weight": "binary_centred", "activation": "int8", "weight_ste": "tanh"},
                {"weight": "binary_centred", "activation": "sign", "activation_ste": "tanh"},
            )
        ),
        (
            {"model__precision": "bitnet_b158(warmup=0.5)"},
            {"model__precision": "bitnet_b158(warmup=0.5)"},
            "got warmup=0.5, which depends on the total",
        ),
        (
            {"model__sub_norm_warmup": 0.5},
            {"model__sub_norm_warmup": 0.5},
            "got sub_norm_warmup=0.5, which depends on the total",
        ),
    ],
)
def test_runs_that_share_nothing_are_refused(
    study: Study, tmp_path: Path, first: dict, second: dict, message: str
) -> None:
    shorter, longer = lasting(study, 4, **first), lasting(study, 8, **second)
    with pytest.raises(ValueError, match=message):
        train_longer(shorter, tmp_path / "4", longer, tmp_path / "8")
    assert not (tmp_path / "8").exists()
