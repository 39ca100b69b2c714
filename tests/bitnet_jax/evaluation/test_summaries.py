"""Summaries: what the model reads, what is cut, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_jax.cli.main import main
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import ByteTokenizer
from bitnet_jax.evaluation import summaries
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.summaries import CUE, answered, continued
from bitnet_jax.models import ModelConfig, init_variables
from bitnet_jax.packed import packing, storage

TOKENIZER = ByteTokenizer()
CONFIG = ModelConfig(
    vocab_size=257,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    ffn_size=32,
    max_length=100,
    precision="bitnet_b158",
)
CHAT = Conversation(end=(0,), template="{% for m in messages %}<{{ m.content }}>{% endfor %}")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the model reads."""
    prompts: list[str] = []

    def told(model: TextModel, given: Sequence[np.ndarray], count: int, **_: object) -> list[str]:
        prompts.extend(TOKENIZER.decode(ids[ids < 256]) for ids in given)
        return [f" summary {i} " for i in range(len(given))]

    monkeypatch.setattr(summaries, "complete", told)
    return prompts


def test_a_text_is_followed_by_the_cue_or_stands_in_a_message(seen: list[str]) -> None:
    assert continued(TextModel(CONFIG, {}, TOKENIZER), ["a text", "another"], 5) == (
        ["summary 0", "summary 1"],
        {},
    )
    assert [text.lstrip("\0") for text in seen] == [f"a text{CUE}", f"another{CUE}"]
    seen.clear()
    found = answered(TextModel(CONFIG, {}, TOKENIZER, CHAT), ["a text"], 5, instruction="Say less.")
    assert (found.texts, found.cut) == (["summary 0"], {})
    assert seen == ["<Say less.\n\na text>"]


def test_a_long_text_is_cut_so_that_the_prompt_fits(seen: list[str]) -> None:
    text = "x" * 200
    found = answered(TextModel(CONFIG, {}, TOKENIZER, CHAT), ["short", text], 20, instruction="Say less.")
    assert seen[1] == f"<Say less.\n\n{'x' * (80 - 13)}>"
    assert found.cut == {1: 67}
    seen.clear()
    found = continued(TextModel(CONFIG, {}, TOKENIZER), [text], 20)
    (count,) = found.cut.values()
    assert len(seen[0].lstrip("\0")) == count + len(CUE)
    with pytest.raises(DataError, match="expected room for a text, 13 tokens around it and 95 of answer"):
        answered(TextModel(CONFIG, {}, TOKENIZER, CHAT), [text], 95, instruction="Say less.")
    with pytest.raises(DataError, match="got text 1 without a token"):
        continued(TextModel(CONFIG, {}, TOKENIZER), ["a", ""], 5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = packing.pack(init_variables(CONFIG, jax.random.key(0))["params"], CONFIG)
    storage.save_packed(tmp_path / "model", packed, CONFIG, TOKENIZER)
    (tmp_path / "texts.txt").write_text("one text\nand another one\n")
    given = [
        str(tmp_path / "model"),
        "--tokens",
        "4",
        "--format",
        "jsonl",
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert main(["summarize", *given, "--file", str(tmp_path / "texts.txt")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["one text", "and another one"]
    assert rows == json.loads((tmp_path / "s.json").read_text())["summaries"]
    assert main(["summarize", given[0], "one text", "--tokens", "4"]) == 0
    assert capsys.readouterr().out == " ".join(rows[0]["summary"].split()) + "\n"  # alone as in a batch
    assert main(["summarize", given[0], "x", "--instruction", "Say less."]) == 2
    assert "which has no chat template" in capsys.readouterr().err
