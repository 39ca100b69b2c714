"""Samples at evaluations: they continue held-out text, change no bits, and are not repeated after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.inference.generation import generate
from bitnet_jax.training import RunConfig, fit, load_run

Config = Callable[..., RunConfig]
TEXT = "".join(f"Line {i} of a tiny text about quantized numbers. " for i in range(40))


def samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]


@pytest.mark.extended
@pytest.mark.unchecked_annotations  # generation builds caches of shapes
def test_samples_continue_the_held_out_text_and_change_nothing(tmp_path: Path, run_config: Config) -> None:
    (tmp_path / "text.txt").write_text(TEXT)

    def config(steps: int = 6, **evaluation: Any) -> RunConfig:
        return run_config(
            data=dict(source="text.txt", root=str(tmp_path), split="tail", valid_fraction=0.2, length=32),
            evaluation=dict(batches=1) | evaluation,
            optimizer=dict(schedule="constant"),
            training=dict(steps=steps),
        )

    assert config().hash() == config(sample_tokens=32).hash(), "runs without samples keep their hash"
    with pytest.raises(ValueError, match="sample_tokens: got 32, expected at most 31"):
        fit(config(samples=1, sample_tokens=32), tmp_path / "run")
    plain = fit(config(), tmp_path / "plain", progress=False)
    result = fit(config(samples=2, sample_tokens=8), tmp_path / "run", progress=False)
    assert (result["train"], result["valid"]) == (plain["train"], plain["valid"])
    assert not (tmp_path / "plain" / "samples.jsonl").exists()

    found = samples(tmp_path / "run")
    assert [(row["step"], row["kind"]) for row in found] == [
        (3, "sample_0"),
        (3, "sample_1"),
        (6, "sample_0"),
        (6, "sample_1"),
    ]
    prompts = found[2]["prompt"] + found[3]["prompt"]
    assert len(prompts) == 2 * 24
    assert prompts.removeprefix("\0") in TEXT, "the first one begins like a document"
    _, model, params, tokenizer = load_run(tmp_path / "run")
    tokens = tokenizer.encode(found[3]["prompt"])[None]
    written = generate(model, {"params": params}, tokens, max_new_tokens=8).tokens
    assert found[3]["text"] == tokenizer.decode(np.asarray(written[0]))

    fit(config(steps=7, samples=2, sample_tokens=8), tmp_path / "run", progress=False)
    assert samples(tmp_path / "run")[:4] == found
    assert [row["step"] for row in samples(tmp_path / "run")[4:]] == [7, 7]
