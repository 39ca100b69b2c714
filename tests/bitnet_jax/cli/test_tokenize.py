"""`tokenize`: trains a BPE on the training part, measures it on the other, and leaves the tokens for `train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.data import corpus, from_json, load_corpus

WORDS = "the cat sat on a mat and ate rats; that was the end of them all\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("tokenizers", reason="the tokenizers library is an extra")
    monkeypatch.setenv("BITNET_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "SLOW_BYTES", 0)
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(WORDS[i % 20 :] + WORDS * (i % 3))
    return tmp_path


def test_a_bpe_is_trained_measured_and_its_tokens_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenize", f"{place}/texts", "--valid-fraction", "0.3", "--json", f"{place}/f.json"]
    output = f"{place}/tokenizer.json"
    assert cli.main([*command, "--vocab-size", "290", "--output", output]) == 0
    figures = json.loads((place / "f.json").read_text())
    assert f"held out: {figures['bytes_per_token']:.3f} bytes a token" in capsys.readouterr().out
    tokenizer = from_json(Path(output).read_text())
    assert (tokenizer.vocab_size, tokenizer.decode(tokenizer.encode(WORDS))) == (290, WORDS)
    monkeypatch.setattr(corpus, "stream_blocks", None)  # not tokenized again
    found = load_corpus(f"{place}/texts", tokenizer=output, valid_fraction=0.3)
    ids = found.valid[found.valid != tokenizer.eos_id]
    assert len(found.valid) - len(ids) == found.valid_documents + 1
    assert figures["bytes_per_token"] == found.valid_bytes / len(ids) > 2
    assert figures["vocabulary_used"] == len(set(found.valid.tolist())) / 290
    assert cli.main([*command, "--tokenizer", output]) == 0
    again = json.loads((place / "f.json").read_text())
    assert again | {"seconds": 0} == figures | {"seconds": 0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--vocab-size", "290"], "expected both, or --tokenizer FILE"),
        (["--tokenizer", "byte", "--output", "x"], "expected both, or --tokenizer FILE"),
        (
            ["--vocab-size", "257", "--output", "x"],
            "got 257, expected more than the 256 bytes and the end token",
        ),
        (["--vocab-size", "5000", "--output", "x"], "got 5000, expected at most the"),
        (["--vocab-size", "290", "--output", "texts"], "texts, which exists; use --overwrite"),
        (["--tokenizer", "nowhere.json"], "nowhere.json"),
    ],
)
def test_invalid_options_are_one_line(
    place: Path,
    options: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    assert cli.main(["tokenize", "texts", *options]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (place / "x").exists()
