"""Packed folders: the same bytes back without a copy, whole or not at all, and no damage goes unnoticed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing, storage, tensor_file
from bitnet_jax.packed.storage import StorageError, load_packed, save_packed
from bitnet_jax.packed.tensor_file import Streamed
from bitnet_jax.packed.whole_folder import whole_folder
from tests.robustness.fuzz_packed_folders import take_apart

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=24, num_layers=1, num_heads=2, ffn_size=40, max_length=32,
    embedding_dtype="bfloat16",
    precision=(
        ("*/q_proj", "paretoq_1.58"), ("*/k_proj", "bit"), ("*/mlp/*", "bitnet"), ("*/o_proj", "float32"),
        ("*", "bitnet_b158"),
    ),
)  # fmt: skip
TOKENIZER = CharTokenizer("abcdefé\n", separator="\n")
FILES = {"model.safetensors", "config.json", "tokenizer.json"}


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    abstract = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    generator = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Learned scales, which have a side of 1 or none, are positive.
        signs = generator.choice([-1, 1], leaf.shape) if min(leaf.shape, default=1) > 1 else 1
        return jnp.asarray(generator.uniform(0.1, 1, leaf.shape) * signs, leaf.dtype)

    return packing.pack(jax.tree.map(values, abstract["params"]), CONFIG)


@pytest.fixture(scope="module")
def saved(variables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage") / "model"
    save_packed(folder, variables, CONFIG, TOKENIZER)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def header_of(folder: Path) -> tuple[dict[str, Any], int]:
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), end


def replace_header(folder: Path, header: dict[str, Any] | str) -> None:
    path = folder / "model.safetensors"
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[header_of(folder)[1] :])


def sign(folder: Path) -> None:
    """Makes all checksums right again, as a hostile author would."""
    take_apart(folder).write(folder)


# Round trip


def test_what_is_loaded_is_what_was_saved(saved: Path, variables: dict[str, Any]) -> None:
    assert {entry.name for entry in saved.iterdir()} == FILES
    for verify in (True, False):
        config, loaded, tokenizer, _ = load_packed(saved, verify=verify)
        assert config == CONFIG
        assert_same(loaded, variables)
        assert tokenizer is not None
        assert tokenizer.to_json() == TOKENIZER.to_json()


def test_the_trained_length_goes_along_and_a_folder_without_it_is_read(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_dict(
        CONFIG.to_dict() | {"trained_length": 10**9}
    )  # however much the file holds
    save_packed(tmp_path / "model", variables, config)
    assert load_packed(tmp_path / "model")[0].trained_length == 10**9
    with monkeypatch.context() as patch:  # what versions without the field wrote
        old = {name: value for name, value in config.to_dict().items() if name != "trained_length"}
        patch.setattr(ModelConfig, "to_dict", lambda config: old)
        save_packed(tmp_path / "old", variables, config)
    assert load_packed(tmp_path / "old")[0].trained_length is None


def test_a_loaded_model_computes_what_the_saved_one_does(saved: Path, variables: dict[str, Any]) -> None:
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
    loaded_config, loaded, tokenizer, _ = load_packed(tmp_path / "deep" / "er" / "model")
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


def test_the_official_library_reads_our_file(saved: Path, variables: dict[str, Any]) -> None:
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


def test_we_read_what_the_official_library_writes_if_it_is_aligned_and_else_say_so(tmp_path: Path) -> None:
    # The official writer aligns to 8 bytes; a metadata string fills its header up to the next multiple of 64.
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


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("x", np.zeros(3, np.float64)), ("x", np.zeros((0, 3), np.uint8)), ("__pad.1", np.zeros(3, np.uint8))],
)
def test_the_writer_refuses_what_the_reader_would(tmp_path: Path, name: str, tensor: np.ndarray) -> None:
    with (
        (tmp_path / "x").open("wb") as file,
        pytest.raises(StorageError, match=r"expected one of U8"),
    ):
        tensor_file.write(file, {name: tensor}, {})


def test_a_tensor_may_be_streamed_and_is_written_as_if_it_had_been_whole(tmp_path: Path) -> None:
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
        ([np.zeros(3, np.uint8)], "x: its chunks have 3 bytes, expected 4"),
        ([np.zeros(3, np.uint8), np.zeros(2, np.uint8)], "x: its chunks have 5 bytes, expected 4"),
        ([np.zeros(1, np.float32)], "x: got a chunk of float32, expected uint8"),
    ],
)
def test_a_stream_that_is_not_what_it_says_is_refused(
    tmp_path: Path, chunks: list[np.ndarray], message: str
) -> None:
    with (tmp_path / "x").open("wb") as file, pytest.raises(StorageError, match=message):
        tensor_file.write(file, {"x": Streamed((4,), np.dtype(np.uint8), chunks)}, {})


# Damage


@given(data=st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_bytes_are_refused_or_change_nothing(
    saved: Path, variables: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    path = folder / data.draw(st.sampled_from(sorted(FILES)))
    content = bytearray(path.read_bytes())
    # Headers are small beside tensors; draw from the front as often as from everywhere.
    last = min(len(content), data.draw(st.sampled_from([64, 4000, len(content)]))) - 1
    kind = data.draw(st.sampled_from(["change", "change", "cut", "insert", "swap"]))
    place = data.draw(st.integers(0, last))
    if kind == "change":
        for offset in data.draw(st.lists(st.integers(0, last), min_size=1, max_size=3)):
            content[offset] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[place : data.draw(st.sampled_from([place + 1, place + 64, len(content)]))]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=64))
    else:
        other = data.draw(st.integers(0, last))
        content[place : place + 64], content[other : other + 64] = (
            content[other : other + 64],
            content[place : place + 64],
        )
    path.write_bytes(content)
    refusal = None
    try:
        config, loaded, tokenizer, _ = load_packed(folder)
    except StorageError as error:
        refusal = str(error)
    if refusal is not None:
        assert "\n" not in refusal
        return
    assert config == CONFIG
    assert_same(loaded, variables)
    assert tokenizer is not None
    assert tokenizer.to_json() == TOKENIZER.to_json()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 4000, -1])
def test_a_truncated_file_is_refused_without_reading_it_all(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match="model.safetensors"):
        load_packed(copy, verify=False)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 56])
def test_a_lying_header_length_is_refused_at_once(copy: Path, length: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(StorageError, match=r"header claims|not valid JSON"):
        load_packed(copy, verify=False)


def edit(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(changes)


NORM = "params/final_norm/scale"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown dtype": (edit(NORM, dtype="F64"), "expected a dtype out of"),
    "smaller dtype": (edit("params/layers_0/attention/o_proj/weight", dtype="U8"), "expected 576 bytes"),
    "negative shape": (edit(NORM, shape=[-24]), "expected a dtype"),
    "empty shape": (edit(NORM, shape=[0]), "expected a dtype"),
    "bool shape": (edit(NORM, shape=[True]), "expected a dtype"),
    "float shape": (edit(NORM, shape=[24.0]), "expected a dtype"),
    "huge shape": (edit(NORM, shape=[2**62, 2**62]), "lies at"),
    "reshaped": (edit(NORM, shape=[2, 12]), r"got float32\[2, 12\], expected by the config float32\[24\]"),
    "overlap": (edit(NORM, data_offsets=[0, 96]), "lies at"),
    "hole": (lambda h: h.pop(next(name for name in h if name.startswith("__pad"))), "lies at"),
    "beyond the end": (edit(NORM, data_offsets=[10**15, 10**15 + 96]), "lies at"),
    "backwards": (edit(NORM, data_offsets=[96, 0]), "lies at"),
    "three offsets": (edit(NORM, data_offsets=[0, 96, 96]), "two data_offsets"),
    "unknown key": (edit(NORM, stride=1), "two data_offsets"),
    "renamed": (lambda h: h.update({"params/extra/scale": h.pop(NORM)}), "no such tensor"),
    "not a table": (lambda h: h.update({NORM: 7}), "is described by 7"),
    "no format": (lambda h: h["__metadata__"].pop("format"), "got format None"),
    "newer version": (lambda h: h["__metadata__"].update(version="2"), "version '2', expected"),
    "no checksums": (lambda h: h["__metadata__"].pop("crc32"), "not valid JSON"),
    "metadata of numbers": (lambda h: h["__metadata__"].update(version=1), "table of strings"),
    "other packed format": (
        lambda h: h["__metadata__"].update(packed=h["__metadata__"]["packed"].replace("binary", "ternary2")),
        "packed formats, layouts or shapes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_an_inconsistent_header_is_refused(copy: Path, case: str) -> None:
    change, message = HEADERS[case]
    header, _ = header_of(copy)
    change(header)
    replace_header(copy, header)
    with pytest.raises(StorageError, match=message):
        load_packed(copy, verify=False)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "{" + '"a":{' * 5_000,
        "[]",
        '{"a": NaN}',
        '{"a": {}, "a": {}}',
        "",
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_a_header_that_is_no_plain_object_is_refused(copy: Path, text: str) -> None:
    replace_header(copy, text)
    with pytest.raises(StorageError, match=r"not valid JSON|expected an object"):
        load_packed(copy, verify=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**9}, r"num_layers=1000000000, the file has room for"),
        ({"hidden_size": 2**70}, "hidden_size="),
        ({"head_dim": 10**12}, "head_dim="),
        ({"num_layers": 2}, "layers_1/.*no such tensor, expected by the config"),
        ({"ffn_size": 41}, r"got float32\[40\], expected by the config float32\[41\]"),
        ({"precision": "bitnet"}, "expected by the config"),
        ({"tie_embeddings": False}, "params/lm_head/weight: got no such tensor"),
        ({"embedding_dtype": "float32"}, r"got bfloat16\[300, 24\], expected by the config float32"),
        ({"hidden_sise": 24}, "hidden_sise is not a field; did you mean hidden_size"),
        ({"num_heads": "two"}, "config.json: "),
        ({"norm_eps": "small"}, "config.json: "),
        ({"precision": 5}, "config.json: "),
        ({"precision": "no_such_recipe"}, "no_such_recipe"),
        ({"causal": "yes"}, "model.causal: got 'yes', expected bool"),
        ({"use_bias": 1}, "model.use_bias: got 1, expected bool"),
        ({"rope_theta": -1.0}, "model.rope_theta: got -1.0, expected a positive number"),
        ({"norm_eps": 0}, "model.norm_eps: got 0, expected a positive number"),
        ({"num_kv_heads": -2}, "num_kv_heads=-2, the file has room"),
        ({"dropout": 1.5}, "model.dropout: got 1.5, expected a number from 0 to below 1"),
        ({"max_length": 2**70}, "max_length=1180591620717411303424, the file has room for 2147483647"),
        ({"architecture": "rnn"}, "model.architecture: got 'rnn', expected one of transformer, mlp"),
        ({"architecture": "cnn"}, "vocab_size is not a field"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused_quickly(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(StorageError, match="config.json has the checksum"):
        load_packed(copy, verify=False)
    sign(copy)
    started = time.process_time()
    with pytest.raises(StorageError, match=message):
        load_packed(copy, verify=False)
    assert time.process_time() - started < 20  # a size believed would take minutes or all memory


def test_missing_and_foreign_files_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="config.json cannot be read .No such file"):
        load_packed(tmp_path / "nowhere")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(StorageError, match="tokenizer.json has the checksum"):
        load_packed(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(StorageError, match="tokenizer.json has the checksum None, expected"):
        load_packed(copy)
    (copy / "tokenizer.json").write_text("{}")
    sign(copy)
    with pytest.raises(StorageError, match="tokenizer.json: tokenizer.json: got kind None"):
        load_packed(copy, verify=False)
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")  # would block whoever opens it
    with pytest.raises(StorageError, match="tokenizer.json: got no regular file"):
        load_packed(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "model.safetensors").unlink()
    with pytest.raises(StorageError, match="model.safetensors cannot be read .No such file"):
        load_packed(copy)
    (copy / "config.json").write_bytes(b"\xff")
    (copy / "model.safetensors").mkdir()
    with pytest.raises(StorageError, match="model.safetensors cannot be read .Is a directory"):
        load_packed(copy)


def test_codes_that_no_packer_writes_are_refused_even_with_right_checksums(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = jax.tree.map(lambda leaf: leaf, variables)
    weight = broken["packed"]["layers_0"]["attention"]["v_proj"]["weight"]
    broken["packed"]["layers_0"]["attention"]["v_proj"]["weight"] = type(weight)(
        weight.codes | jnp.uint8(255), weight.scale, weight.format, weight.layout, weight.shape
    )
    with pytest.raises(StorageError, match="v_proj/weight: codes hold the field 3"):
        save_packed(tmp_path / "model", broken, CONFIG)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(storage, "validate", lambda weight, contents: None)
        save_packed(tmp_path / "model", broken, CONFIG)
    with pytest.raises(StorageError, match="v_proj/weight: codes hold the field 3"):
        load_packed(tmp_path / "model")


def flip(folder: Path, name: str) -> None:
    """One bit of a tensor."""
    path = folder / "model.safetensors"
    header, start = header_of(folder)
    content = bytearray(path.read_bytes())
    content[start + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def test_the_largest_tensors_of_a_large_model_are_verified_only_where_that_is_asked_for(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, _ = header_of(copy)
    begins_and_ends = {n: e["data_offsets"] for n, e in header.items() if not n.startswith("__")}
    sizes = {name: end - begin for name, (begin, end) in begins_and_ends.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    monkeypatch.setattr(storage, "VERIFIED_BYTES", sum(sizes.values()) - 1)
    load_packed(copy)
    flip(copy, largest)
    load_packed(copy)
    with pytest.raises(StorageError, match=f"{largest} has the checksum"):
        load_packed(copy, verify=True)
    flip(copy, "params/final_norm/scale")
    with pytest.raises(StorageError, match="params/final_norm/scale has the checksum"):
        load_packed(copy)
    load_packed(copy, verify=False)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])  # what can be seen without reading is looked at always
    with pytest.raises(StorageError, match="truncated"):
        load_packed(copy, verify=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_bit_of_a_small_file_is_never_overlooked_however_large_the_model(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A changed rope_theta or vocabulary fits all tensors, and makes another model."""
    monkeypatch.setattr(storage, "VERIFIED_BYTES", 0)
    path = copy / name
    old, new = {"config.json": ("10000.0", "40000.0"), "tokenizer.json": ("abc", "acb")}[name]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    for verify in (None, False):
        with pytest.raises(StorageError, match=f"{name} has the checksum"):
            load_packed(copy, verify=verify)


def test_scales_that_are_no_numbers_are_refused_even_unverified_and_signed(copy: Path) -> None:
    folder = take_apart(copy)
    np.frombuffer(folder.tensor("packed/layers_0/mlp/up_proj/weight/scale"), np.float32)[0] = np.nan
    folder.write(copy)
    with pytest.raises(StorageError, match="up_proj/weight: scale holds NaN"):
        load_packed(copy, verify=False)


# Writing whole or not at all


def test_variables_of_another_config_are_not_written(variables: dict[str, Any], tmp_path: Path) -> None:
    other = ModelConfig.from_dict(CONFIG.to_dict() | {"precision": "bitnet"})
    with pytest.raises(StorageError, match="the variables: packed/layers_0/attention/o_proj/weight/codes"):
        save_packed(tmp_path / "model", variables, other)
    relabelled = jax.tree.map(lambda leaf: leaf, variables)
    mlp = relabelled["packed"]["layers_0"]["mlp"]
    weight = mlp["up_proj"]["weight"]
    mlp["up_proj"]["weight"] = dataclasses.replace(
        weight, codes=jnp.zeros_like(weight.codes), format="ternary2", shape=(40, 12)
    )
    with pytest.raises(StorageError, match="packed formats, layouts or shapes are not those of the config"):
        save_packed(tmp_path / "model", relabelled, CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_config_that_json_changes_is_not_written(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = CONFIG.to_dict() | {"init_std": 0.5}
    monkeypatch.setattr(ModelConfig, "to_dict", lambda config: changed)
    with pytest.raises(StorageError, match="the config changes on a trip through JSON"):
        save_packed(tmp_path / "model", variables, CONFIG)
    assert not list(tmp_path.iterdir())


class Failing:
    """Stands in for os.fsync: works `calls` times, then fails."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self.calls, self.error, self.fsync = calls, error, os.fsync

    def __call__(self, descriptor: int) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        self.fsync(descriptor)


@pytest.mark.parametrize("calls", range(5))
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_at_any_moment_leaves_nothing_behind_and_the_old_model_whole(
    variables: dict[str, Any],
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
    existing: bool,
) -> None:
    folder = tmp_path / "models" / "model"
    if existing:
        shutil.copytree(saved, folder)
    before = sorted(path for path in tmp_path.rglob("*"))
    changed = jax.tree.map(lambda leaf: leaf, variables)
    changed["params"]["final_norm"]["scale"] = jnp.ones(24)

    monkeypatch.setattr(os, "fsync", Failing(calls, OSError(errno.ENOSPC, "No space left on device")))
    # Three files and their folder are synced before the rename, the parent after it.
    with pytest.raises(
        StorageError, match=r"cannot be written \(No space left on device\); nothing was left"
    ):
        save_packed(folder, changed, CONFIG, TOKENIZER, overwrite=existing)
    monkeypatch.undo()
    assert sorted(path for path in tmp_path.rglob("*")) == before
    if existing:
        assert_same(load_packed(folder)[1], variables)


def test_an_interrupt_cleans_up_too_and_is_passed_on(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", Failing(1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_packed(tmp_path / "model", variables, CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_file_size_limit_of_the_system_is_a_clear_error(variables: dict[str, Any], tmp_path: Path) -> None:
    """The real thing: the kernel refuses the write in the middle of the file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot be written \(File too large\)"):
            save_packed(tmp_path / "model", variables, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(
        StorageError, match=r"got 10,000 bytes free on its disk, expected \d\d,\d{3} at least"
    ):
        save_packed(tmp_path / "deep" / "model", variables, CONFIG)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_to(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written .Not a directory"):
        save_packed(tmp_path / "file" / "model", variables, CONFIG)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who runs some test machines, is never refused
    with pytest.raises(StorageError, match="cannot be written .Permission denied"):
        save_packed(tmp_path / "model", variables, CONFIG)


def test_overwriting_is_asked_for_and_never_removes_other_things(
    variables: dict[str, Any], copy: Path
) -> None:
    with pytest.raises(StorageError, match="exists; choose another folder or pass overwrite=True"):
        save_packed(copy, variables, CONFIG)
    save_packed(copy, variables, CONFIG, ByteTokenizer(), overwrite=True)
    tokenizer = load_packed(copy)[2]
    assert isinstance(tokenizer, ByteTokenizer)
    save_packed(copy, variables, CONFIG, overwrite=True)
    assert load_packed(copy)[2] is None
    assert [entry.name for entry in copy.parent.iterdir()] == [copy.name]

    (copy / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="is no packed model and will not be overwritten"):
        save_packed(copy, variables, CONFIG, overwrite=True)
    assert (copy / "notes.txt").read_text() == "mine"
    link = copy.parent / "link"
    link.symlink_to(copy)
    with pytest.raises(StorageError, match="will not be overwritten"):
        save_packed(link, variables, CONFIG, overwrite=True)


def test_a_model_in_use_survives_being_overwritten(variables: dict[str, Any], copy: Path) -> None:
    _, loaded, *_ = load_packed(copy)
    changed = jax.tree.map(lambda leaf: leaf, variables)
    changed["params"]["final_norm"]["scale"] = jnp.ones(24)
    save_packed(copy, changed, CONFIG, overwrite=True)
    assert_same(loaded, variables)
    assert_same(load_packed(copy)[1], changed)


# Writers that were killed


def test_what_killed_writers_left_is_removed_and_an_old_folder_given_back(
    variables: dict[str, Any], copy: Path
) -> None:
    """As after kill -9 in the midst of writing, and between the two renames of an overwrite."""
    begun = copy.with_name(".copy.0123456789ab")
    begun.mkdir()
    (begun / "model.safetensors").write_bytes(b"half")
    copy.rename(copy.with_name(".copy.0123456789ab.old"))
    foreign = copy.with_name(".copy.notes")
    foreign.mkdir()
    with pytest.raises(StorageError, match="copy exists"):
        save_packed(copy, variables, CONFIG)
    assert_same(load_packed(copy, verify=True).variables, variables)
    assert {entry.name for entry in copy.parent.iterdir()} == {"copy", ".copy.notes"}


def test_a_writer_at_work_is_left_alone(copy: Path, variables: dict[str, Any]) -> None:
    with whole_folder(copy, 0, overwrite=True) as temporary:
        (temporary / "model.safetensors").write_bytes(b"half")
        with pytest.raises(StorageError, match="copy exists"):
            save_packed(copy, variables, CONFIG)
        assert (temporary / "model.safetensors").exists()


def test_a_folder_that_another_process_made_meanwhile_stays(copy: Path, variables: dict[str, Any]) -> None:
    """Two packings to one folder: the target was free when each of them began."""
    target = copy.with_name("target")

    def meanwhile(count: int) -> None:
        if not target.exists():
            shutil.copytree(copy, target)
            (target / "mine").touch()

    with pytest.raises(StorageError, match="target was made by another process meanwhile"):
        save_packed(target, variables, CONFIG, on_bytes=meanwhile)
    assert (target / "mine").exists()
    assert {entry.name for entry in copy.parent.iterdir()} == {"copy", "target"}


def test_a_name_taken_between_the_two_renames_of_an_overwrite_leaves_nothing(
    copy: Path, variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def taken(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if target.suffix == ".old":
            copy.mkdir()
            (copy / "theirs").touch()
        return renamed

    monkeypatch.setattr(Path, "rename", taken)
    with pytest.raises(StorageError, match="copy cannot be written"):
        save_packed(copy, variables, CONFIG, overwrite=True)
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
    assert [entry.name for entry in copy.iterdir()] == ["theirs"]
