"""Sentence encoders: vectors of transformers, the same alone and in a batch, and folders that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax.cli.main import main
from bitnet_jax.inference.text_vectors import embed, encoder_ids
from bitnet_jax.model_folders import load_text_model
from bitnet_jax.tools.pack_model import pack_model
from tests.bitnet_jax.interop import sentence_folder

pytest.importorskip("tokenizers")
TEXTS = ["a cat sat on the mat", "The dog barks", "a", "cat " * 30]
# First eight numbers of the mean hidden states of BertModel at unit length (transformers 4.57.1, torch 2.14.1).
EXPECTED = {
    (2, 4, 5, 7, 8, 9, 10, 3): [
        -0.016314, -0.191373, 0.07852, -0.260721, -0.017345, 0.089408, 0.020553, -0.078219,
    ],
    (2, 3): [-0.056297, -0.173296, 0.101013, -0.199993, -0.054953, 0.133296, 0.019868, -0.02699],
}  # fmt: skip


NORM = "encoder.layer.0.output.LayerNorm.bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sentence_folder.write(tmp_path / "encoder")


def test_vectors_are_those_of_transformers(folder: Path) -> None:
    model = load_text_model(folder)
    assert (model.kind, model.config.known_length) == ("sentences", 24)
    ids = [np.array(one, np.int32) for one in EXPECTED]
    vectors = embed(model.config, model.variables, ids)
    for vector, expected in zip(vectors, EXPECTED.values(), strict=True):
        np.testing.assert_allclose(vector[:8], expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_begin_and_end_are_written_around_texts_and_long_ones_are_cut(folder: Path) -> None:
    model = load_text_model(folder)
    ids, cut = encoder_ids(model.tokenizer, model.conversation, TEXTS, model.config.known_length)
    assert ids[0].tolist() == [2, 4, 5, 7, 8, 9, 10, 3]
    assert [len(one) for one in ids] == [8, 5, 3, 24]
    assert cut == [3]
    assert (ids[3][0], ids[3][-1]) == (2, 3)


@pytest.mark.parametrize("recipe", [None, "int8", "bitnet_b158"])
def test_a_vector_does_not_depend_on_other_texts(folder: Path, tmp_path: Path, recipe: str | None) -> None:
    source = folder
    if recipe is not None:
        source = tmp_path / "packed"
        pack_model(folder, source, recipe=recipe)
    model = load_text_model(source)
    ids, _ = encoder_ids(model.tokenizer, model.conversation, TEXTS * 3, model.config.known_length)
    together = embed(model.config, model.variables, ids, batch_size=4)
    for i in range(len(TEXTS)):
        alone = embed(model.config, model.variables, [ids[i]], batch_size=4)
        np.testing.assert_array_equal(alone[0], together[i])
        np.testing.assert_array_equal(alone[0], together[i + len(TEXTS)])


def test_the_command_writes_vectors_and_sorts_by_likeness(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    assert main(["embed", str(folder), "--file", str(file), "--json", str(tmp_path / "v.json")]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS[:3] + [TEXTS[3]]
    assert json.loads((tmp_path / "v.json").read_text()) == {"dimension": 32, "texts": rows}
    assert "cut to 24 tokens: 'cat cat" in shown.err

    assert main(["embed", str(folder), *TEXTS[:3], "--like", TEXTS[1]]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"1.0000\t{TEXTS[1]}"
    assert main(["info", str(folder)]) == 0
    assert "mean of the hidden states" in capsys.readouterr().out


def _changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return content | changes


def _without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in sentence_folder.tensors().items() if key != name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": sentence_folder.MODULES[:2]}, "expected Transformer, Pooling, Normalize"),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}},
            "got the modes pooling_mode_cls_token",
        ),
        ({"config": _changed(sentence_folder.CONFIG, model_type="mpnet")}, "model_type: got 'mpnet'"),
        ({"config": _changed(sentence_folder.CONFIG, hidden_act="silu")}, "hidden_act: got 'silu'"),
        (
            {"config": _changed(sentence_folder.CONFIG, position_embedding_type="relative_key")},
            "position_embedding_type is 'relative_key', which may change the vectors",
        ),
        ({"config": _changed(sentence_folder.CONFIG, is_decoder=True)}, "is_decoder is True"),
        ({"tensors": _without("encoder.layer.1.output.dense.bias")}, "encoder.layer.1.output.dense.bias"),
        (
            {
                "tensors": sentence_folder.tensors()
                | {"encoder.layer.0.output.LayerNorm.bias": np.full(32, np.nan, "f4")}
            },
            "NaN or infinity",
        ),
        (
            {"tensors": sentence_folder.tensors() | {NORM: np.zeros(16, np.float32)}},
            r"LayerNorm.bias: got float32\[16\], expected floats \[32\]",
        ),
        ({"longest": -1}, "max_seq_length is -1"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_text_model(sentence_folder.write(tmp_path / "encoder", **changes))


def test_a_language_model_has_no_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_text_model(sentence_folder.write(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="text 1: got 0 tokens"):
        embed(model.config, model.variables, [np.array([2, 3]), np.array([], np.int32)])
    with pytest.raises(ValueError, match="outside of 0 to 29"):
        embed(model.config, model.variables, [np.array([30])])
