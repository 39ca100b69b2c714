"""No damage to a packed folder goes undetected, whether or not its checksums were recomputed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_jax.packed import storage
from bitnet_jax.packed.storage import StorageError, load_packed, save_packed
from tests.bitnet_jax.packed.folders import (
    CONFIG,
    FILES,
    TOKENIZER,
    assert_same,
    header_of,
    replace_header,
    sign,
)
from tests.robustness.fuzz_packed_folders import take_apart


@pytest.mark.extended
@given(data=st.data())
@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_changed_bytes_are_rejected_or_harmless(
    saved: Path, variables: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    path = folder / data.draw(st.sampled_from(sorted(FILES)))
    content = bytearray(path.read_bytes())
    # Headers are small compared with tensors; draw offsets from the header as often as from the whole file.
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
        config, loaded, tokenizer, *_ = load_packed(folder)
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
def test_a_truncated_file_is_rejected_without_reading_all_of_it(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match="model.safetensors"):
        load_packed(copy, verify=False)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 56])
def test_a_false_header_length_is_rejected_immediately(copy: Path, length: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(StorageError, match=r"header claims|not valid JSON"):
        load_packed(copy, verify=False)


def edit(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(changes)


NORM = "params/final_norm/scale"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown dtype": (edit(NORM, dtype="F64"), "expected a dtype in"),
    "smaller dtype": (edit("params/layers_0/attention/o_proj/weight", dtype="U8"), "expected 576 bytes"),
    "negative shape": (edit(NORM, shape=[-24]), "expected a dtype"),
    "empty shape": (edit(NORM, shape=[0]), "expected a dtype"),
    "bool shape": (edit(NORM, shape=[True]), "expected a dtype"),
    "float shape": (edit(NORM, shape=[24.0]), "expected a dtype"),
    "huge shape": (edit(NORM, shape=[2**62, 2**62]), "is at"),
    "reshaped": (edit(NORM, shape=[2, 12]), r"got float32\[2, 12\], the config expects float32\[24\]"),
    "overlap": (edit(NORM, data_offsets=[0, 96]), "is at"),
    "hole": (lambda h: h.pop(next(name for name in h if name.startswith("__pad"))), "is at"),
    "beyond the end": (edit(NORM, data_offsets=[10**15, 10**15 + 96]), "is at"),
    "backwards": (edit(NORM, data_offsets=[96, 0]), "is at"),
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
def test_an_inconsistent_header_is_rejected(copy: Path, case: str) -> None:
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
def test_a_header_that_is_not_a_plain_object_is_rejected(copy: Path, text: str) -> None:
    replace_header(copy, text)
    with pytest.raises(StorageError, match=r"not valid JSON|expected an object"):
        load_packed(copy, verify=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**9}, r"num_layers: got 1000000000, the file has room for"),
        ({"hidden_size": 2**70}, "hidden_size: got"),
        ({"head_dim": 10**12}, "head_dim: got"),
        ({"num_layers": 2}, "layers_1/.*no such tensor, the config expects"),
        ({"ffn_size": 41}, r"got float32\[40\], the config expects float32\[41\]"),
        ({"precision": "bitnet"}, "the config expects"),
        ({"tie_embeddings": False}, "params/lm_head/weight: got no such tensor"),
        ({"embedding_dtype": "float32"}, r"got bfloat16\[300, 24\], the config expects float32"),
        ({"hidden_sise": 24}, "got 'hidden_sise', .*did you mean 'hidden_size'"),
        ({"num_heads": "two"}, "config.json: "),
        ({"norm_eps": "small"}, "config.json: "),
        ({"precision": 5}, "config.json: "),
        ({"precision": "no_such_recipe"}, "no_such_recipe"),
        ({"causal": "yes"}, "model.causal: got 'yes', expected bool"),
        ({"use_bias": 1}, "model.use_bias: got 1, expected bool"),
        ({"rope_theta": -1.0}, "model.rope_theta: got -1.0, expected a positive number"),
        ({"norm_eps": 0}, "model.norm_eps: got 0, expected a positive number"),
        ({"num_kv_heads": -2}, "num_kv_heads: got -2, the file has room"),
        ({"dropout": 1.5}, "model.dropout: got 1.5, expected a number from 0 to below 1"),
        ({"max_length": 2**70}, "max_length: got 1180591620717411303424, the file has room for 2147483647"),
        ({"architecture": "rnn"}, "model.architecture: got 'rnn', expected one of transformer, mlp"),
        ({"architecture": "cnn"}, "field of model: got 'vocab_size'"),
    ],
)
def test_a_config_that_does_not_match_the_tensors_is_rejected_quickly(
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
    assert time.process_time() - started < 20  # trusting the size would take minutes or all memory


def test_the_error_names_missing_and_unexpected_files(copy: Path, tmp_path: Path) -> None:
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
    os.mkfifo(copy / "tokenizer.json")  # would block when opened
    with pytest.raises(StorageError, match="tokenizer.json: got something other than a regular file"):
        load_packed(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "model.safetensors").unlink()
    with pytest.raises(StorageError, match="model.safetensors cannot be read .No such file"):
        load_packed(copy)
    (copy / "config.json").write_bytes(b"\xff")
    (copy / "model.safetensors").mkdir()
    with pytest.raises(StorageError, match="model.safetensors cannot be read .Is a directory"):
        load_packed(copy)


def test_invalid_codes_are_rejected_even_with_valid_checksums(
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
    """Flips one bit of a tensor."""
    path = folder / "model.safetensors"
    header, start = header_of(folder)
    content = bytearray(path.read_bytes())
    content[start + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def test_the_largest_tensors_of_a_large_model_are_verified_only_on_request(
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
    path.write_bytes(
        path.read_bytes()[:-1]
    )  # whatever can be checked without reading the file is always checked
    with pytest.raises(StorageError, match="truncated"):
        load_packed(copy, verify=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_small_files_are_always_verified_however_large_the_model(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A changed rope_theta or vocabulary is consistent with all tensors, but is another model."""
    monkeypatch.setattr(storage, "VERIFIED_BYTES", 0)
    path = copy / name
    old, new = {"config.json": ("10000.0", "40000.0"), "tokenizer.json": ("abc", "acb")}[name]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    for verify in (None, False):
        with pytest.raises(StorageError, match=f"{name} has the checksum"):
            load_packed(copy, verify=verify)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("up_proj/weight/scale", np.float32), ("gate_proj/weight/scale", np.float16),
     ("gate_proj/weight/minimum", np.float16)],
)  # fmt: skip
def test_non_finite_scales_are_rejected_even_unverified_and_with_valid_checksums(
    copy: Path, name: str, dtype: Any
) -> None:
    folder = take_apart(copy)
    np.frombuffer(folder.tensor(f"packed/layers_0/mlp/{name}"), dtype)[0] = np.nan
    folder.write(copy)
    path, _, leaf = name.rpartition("/")
    with pytest.raises(StorageError, match=f"{path}: {leaf} contains NaN"):
        load_packed(copy, verify=False)
