"""Packed folders: lossless round trips without a copy, and the limits of a tensor file."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from bitnet_jax.data.conversation import Conversation, of_documents
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing, tensor_file
from bitnet_jax.packed.storage import StorageError, load_packed, save_packed
from bitnet_jax.packed.tensor_file import Streamed
from tests.bitnet_jax.packed.folders import (
    CONFIG,
    FILES,
    TOKENIZER,
    assert_same,
    header_of,
    sign,
)


def test_save_load_round_trip(saved: Path, variables: dict[str, Any]) -> None:
    assert {entry.name for entry in saved.iterdir()} == FILES
    for verify in (True, False):
        config, loaded, tokenizer, *_ = load_packed(saved, verify=verify)
        assert config == CONFIG
        assert_same(loaded, variables)
        assert tokenizer is not None
        assert tokenizer.to_json() == TOKENIZER.to_json()


def test_the_trained_length_is_saved_and_folders_without_it_can_be_read(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_dict(
        CONFIG.to_dict() | {"trained_length": 10**9}
    )  # whatever else the file contains
    save_packed(tmp_path / "model", variables, config)
    assert load_packed(tmp_path / "model")[0].trained_length == 10**9
    with monkeypatch.context() as patch:  # as written by versions without the field
        old = {name: value for name, value in config.to_dict().items() if name != "trained_length"}
        patch.setattr(ModelConfig, "to_dict", lambda config: old)
        save_packed(tmp_path / "old", variables, config)
    assert load_packed(tmp_path / "old")[0].trained_length is None


def test_the_conversation_is_saved_and_checked(
    saved: Path, variables: dict[str, Any], tmp_path: Path
) -> None:
    assert load_packed(saved).conversation == of_documents(TOKENIZER), "also of folders that are older"
    said = Conversation((5,), (0, 299), "{{ bos_token }}é", (("bos_token", "<s>"),))
    folder = tmp_path / "model"
    save_packed(folder, variables, CONFIG, TOKENIZER, conversation=said)
    assert {entry.name for entry in folder.iterdir()} == FILES | {"conversation.json"}
    assert load_packed(folder).conversation == said
    shutil.copytree(folder, tmp_path / "copy")
    assert load_packed(tmp_path / "copy", verify=True).conversation == said
    save_packed(folder, variables, CONFIG, TOKENIZER, conversation=said, overwrite=True)

    path = folder / "conversation.json"
    path.write_text(path.read_text().replace("299", "298"))
    with pytest.raises(StorageError, match=r"conversation\.json has the checksum"):
        load_packed(folder)
    path.write_text(path.read_text().replace("298", "300"))
    sign(folder)
    with pytest.raises(
        StorageError, match=r"conversation\.json: end: got the id 300, expected ids below 300"
    ):
        load_packed(folder)
    path.unlink()
    with pytest.raises(StorageError, match=r"conversation\.json has the checksum None"):
        load_packed(folder)
    with pytest.raises(StorageError, match="begin: got the id 300"):
        save_packed(tmp_path / "wrong", variables, CONFIG, conversation=Conversation(begin=(300,)))
    assert not (tmp_path / "wrong").exists()


def test_a_loaded_model_has_the_outputs_of_the_saved_one(saved: Path, variables: dict[str, Any]) -> None:
    _, loaded, *_ = load_packed(saved)
    tokens = jnp.asarray([[5, 250, 7, 0, 31]])
    apply = jax.jit(Transformer(CONFIG).apply)
    np.testing.assert_array_equal(apply(loaded, tokens).logits, apply(variables, tokens).logits)


def test_without_a_tokenizer_and_with_float_recipes_only(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, ffn_size=4, max_length=8, precision="float32"
    )
    abstract = packing.abstract(config)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    save_packed(tmp_path / "deep" / "er" / "model", zeros, config)
    loaded_config, loaded, tokenizer, *_ = load_packed(tmp_path / "deep" / "er" / "model")
    assert (loaded_config, tokenizer) == (config, None)
    assert_same(loaded, zeros)


def test_tensors_are_aligned_and_loaded_without_a_copy(saved: Path) -> None:
    header, start = header_of(saved)
    assert start % 64 == 0
    offsets = [entry["data_offsets"][0] for name, entry in header.items() if not name.startswith("__")]
    assert offsets
    assert not any(offset % 64 for offset in offsets)

    _, loaded, *_ = load_packed(saved)
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith(str(saved / "model.safetensors"))]
    for leaf in jax.tree.leaves(loaded):
        address = leaf.unsafe_buffer_pointer()
        assert any(int(low, 16) <= address < int(high, 16) for low, high in spans)


def test_the_official_library_reads_our_files(saved: Path, variables: dict[str, Any]) -> None:
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    weight = variables["packed"]["layers_0"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(tensors["packed/layers_0/mlp/up_proj/weight/codes"], weight.codes)
    np.testing.assert_array_equal(tensors["packed/layers_0/mlp/up_proj/weight/scale"], weight.scale)
    embedding = tensors["params/embed/embedding"]
    assert embedding.tobytes() == np.asarray(variables["params"]["embed"]["embedding"]).tobytes()
    assert all(not tensors[name].any() for name in tensors if name.startswith("__pad."))
    with safetensors.safe_open(saved / "model.safetensors", "numpy") as file:
        metadata = file.metadata()
        codes = file.get_tensor("params/final_norm/scale").tobytes()
    assert json.loads(metadata["crc32"])["params/final_norm/scale"] == zlib.crc32(codes)
    assert json.loads(metadata["packed"])["layers_0/mlp/up_proj/weight"] == {
        "format": "binary", "layout": "panel16", "shape": [40, 24],
    }  # fmt: skip


def test_files_of_the_official_library_are_read_if_aligned_and_otherwise_rejected(tmp_path: Path) -> None:
    # The official writer aligns to 8 bytes; a metadata string pads its header to a multiple of 64.
    tensors = {"a": np.arange(16, dtype=np.float32), "b": np.arange(64, dtype=np.uint8).reshape(8, 8)}
    path, aligned = tmp_path / "model.safetensors", 0
    for fill in range(64):
        safetensors.numpy.save_file(tensors, path, {"fill": " " * fill})
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        if start % 64:
            with pytest.raises(StorageError, match="expected a multiple of 64"):
                tensor_file.read(path)
        else:
            aligned += 1
            read = tensor_file.read(path)
            assert read.metadata == {"fill": " " * fill}
            np.testing.assert_array_equal(read.tensors["a"], tensors["a"])
            np.testing.assert_array_equal(read.tensors["b"], tensors["b"])
    assert aligned == 8


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the memory of this process from Linux"
)
def test_pages_of_a_file_are_released_and_read_again(tmp_path: Path) -> None:
    def from_files() -> int:
        return int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0])

    tensor = np.arange(8 << 20, dtype=np.uint8)
    with (tmp_path / "model").open("wb") as file:
        tensor_file.write(file, {"a": tensor}, {})
    file = tensor_file.read(tmp_path / "model")
    np.testing.assert_array_equal(file.tensors["a"], tensor)
    before = from_files()
    file.release()
    assert before - from_files() > 6 << 10
    np.testing.assert_array_equal(file.tensors["a"], tensor)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("x", np.zeros(3, np.float64)), ("x", np.zeros((0, 3), np.uint8)), ("__pad.1", np.zeros(3, np.uint8))],
)
def test_the_writer_rejects_whatever_the_reader_would_reject(
    tmp_path: Path, name: str, tensor: np.ndarray
) -> None:
    with (
        (tmp_path / "x").open("wb") as file,
        pytest.raises(StorageError, match=r"expected one of U8"),
    ):
        tensor_file.write(file, {name: tensor}, {})


def test_a_streamed_tensor_is_written_like_an_array(tmp_path: Path) -> None:
    whole = {"a": np.arange(21, dtype=np.float32).reshape(7, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    chunks = (whole["a"][start : start + 2] for start in range(0, 7, 2))
    streamed = {"a": Streamed((7, 3), np.dtype(np.float32), chunks), "b": whole["b"]}
    written = []
    for name, tensors in {"whole": whole, "streamed": streamed}.items():
        told: list[int] = []
        with (tmp_path / name).open("wb") as file:
            tensor_file.write(file, tensors, {"note": "same"}, told.append)
        assert sum(told) == 7 * 3 * 4 + 3 * 2
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert json.loads(tensor_file.read(tmp_path / "streamed").metadata["crc32"]) == {
        name: zlib.crc32(tensor.tobytes()) for name, tensor in whole.items()
    }


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([np.zeros(3, np.uint8)], "x: got chunks of 3 bytes in total, expected 4"),
        ([np.zeros(3, np.uint8), np.zeros(2, np.uint8)], "x: got chunks of 5 bytes in total, expected 4"),
        ([np.zeros(1, np.float32)], "x: got a chunk of float32, expected uint8"),
    ],
)
def test_a_stream_that_does_not_match_its_declaration_is_rejected(
    tmp_path: Path, chunks: list[np.ndarray], message: str
) -> None:
    with (tmp_path / "x").open("wb") as file, pytest.raises(StorageError, match=message):
        tensor_file.write(file, {"x": Streamed((4,), np.dtype(np.uint8), chunks)}, {})
