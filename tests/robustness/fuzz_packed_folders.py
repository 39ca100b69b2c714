"""Fuzzes packed folders as a malicious author would: every checksum is recomputed after the damage.

    python -m tests.robustness.fuzz_packed_folders --cases 20000 --seed 0 --json outcomes.json

Each case changes a valid folder in one or two ways, recomputes the checksums, and loads it. The result must be a
model that satisfies all invariants, or a one-line StorageError, within SECONDS of processor time and GROWTH bytes of
memory.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import json
import resource
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_jax.data import Classes
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.images import Pixels
from bitnet_jax.data.tokenizers import CharTokenizer
from bitnet_jax.models import Architecture, BinaryCNNConfig, ModelConfig
from bitnet_jax.packed import packing
from bitnet_jax.packed.storage import StorageError, load_packed, save_packed
from bitnet_kernels import validate

SECONDS = 2.0
GROWTH = 1 << 28  # growth of the peak resident set in bytes, relative to before the case

Generator = np.random.Generator

CONFIGS: dict[str, Architecture] = {
    "language": ModelConfig(
        vocab_size=40, hidden_size=32, num_layers=1, num_heads=2, ffn_size=32, max_length=16, head="int4",
        precision=(("*/q_proj", "paretoq_1.58"), ("*/k_proj", "bit"), ("*/o_proj", "float32"), ("*", "bitnet_b158")),
    ),
    "images": BinaryCNNConfig(image_size=4, num_classes=3, widths=(4, 8), precision="xnor"),
}  # fmt: skip


@dataclasses.dataclass
class Folder:
    """The parsed contents of a packed folder, which a case changes."""

    header: dict[str, Any]  # of the tensors alone
    metadata: dict[str, Any]  # the tables as objects
    data: bytearray
    files: dict[str, bytes]  # except the model's
    make_right: bool = True  # the checksums, when written
    raw_header: bytes | None = None  # in place of `header` and `metadata`

    def tensor(self, name: str) -> memoryview:
        begin, end = self.header[name]["data_offsets"]
        return memoryview(self.data)[begin:end]

    def write(self, folder: Path) -> None:
        metadata = dict(self.metadata)
        if self.make_right:
            metadata["files_crc32"] = {name: zlib.crc32(content) for name, content in self.files.items()}
            metadata["crc32"] = {
                name: zlib.crc32(self.tensor(name))
                for name in self.header
                if not name.startswith("__pad") and _placed(self, name)
            }
        strings = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()
        }
        raw = self.raw_header
        if raw is None:
            raw = json.dumps(self.header | {"__metadata__": strings}).encode()
        raw += b" " * (-(8 + len(raw)) % 64)
        for path in folder.iterdir():
            path.unlink()
        (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + self.data)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def _placed(folder: Folder, name: str) -> bool:
    """Whether the entry states where its bytes are."""
    entry = folder.header[name]
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return (
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(n) is int and abs(n) < 2**40 for n in offsets)
    )


def take_apart(folder: Path) -> Folder:
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = header.pop("__metadata__")
    for table in ("packed", "crc32", "files_crc32"):
        metadata[table] = json.loads(metadata[table])
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "model.safetensors"}
    return Folder(header, metadata, bytearray(content[end:]), files)


def good_folders(place: Path) -> list[Folder]:
    """One parsed folder for each of CONFIGS."""
    folders = []
    for name, config in CONFIGS.items():
        # Zero bytes are valid codes in every format, and NumPy arrays need no compilation.
        packed = jax.tree.map(
            lambda leaf: np.full(leaf.shape, leaf.dtype != np.uint8, leaf.dtype), packing.abstract(config)
        )
        tokenizer = CharTokenizer("abcdefé\n", separator="\n") if name == "language" else None
        pixels = Pixels(33.0, 70.0, (8, 8))
        classes = (
            Classes("images", (0, 1, 2), pixels=pixels, data={"source": "drawn"})
            if name == "images"
            else None
        )
        said = (
            Conversation((1,), (2, 7), "{{ bos_token }}", (("bos_token", "a"),))
            if name == "language"
            else None
        )
        save_packed(place / name, packed, config, tokenizer, classes, conversation=said)
        folders.append(take_apart(place / name))
    return folders


def _one(random: Generator, values: Any) -> Any:
    values = list(values)
    return values[int(random.integers(len(values)))]


def _strange(random: Generator, like: Any = None) -> Any:
    """A value that is invalid, or barely valid, for a field."""
    values = [
        None, True, False, 0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**62, 2**70, -(2**70), 0.0, -0.0, 0.5, 1.5, 1e-300,
        1e300, "", "x", "float32", "é\n", "0", [], [1], [0, 0], [[1]], {}, {"a": 1}, {"weight": "ternary"}, "9" * 3000,
        float("nan"), float("inf"),
    ]  # fmt: skip
    if isinstance(like, int) and not isinstance(like, bool):
        values += [like + 1, like - 1, like * 2, -like, float(like), str(like), like // 2] * 3
    if isinstance(like, float):
        values += [-like, like * 2, int(like), str(like)] * 3
    if isinstance(like, str):
        values += [
            like + "x",
            like[:-1],
            like.upper(),
            like * 50,
            "ternary2",
            "ternary5",
            "binary",
            "bitnet",
            "int8",
        ] * 2
    if isinstance(like, list) and like:
        values += [like[:-1], like + like, like[::-1], [*like[:-1], _strange(random, like[-1])]] * 4
    return _one(random, values)


def _deep(random: Generator) -> str:
    depth = int(_one(random, (10, 500, 5000, 200_000)))
    return _one(
        random, ("[" * depth, '{"a":' * depth, "[" * depth + "]" * depth, '{"a": ' + "9" * depth + "}")
    )


def header_numbers(folder: Folder, random: Generator) -> None:
    entry = folder.header[_one(random, folder.header)]
    key = _one(random, entry)
    if isinstance(entry[key], list) and random.random() < 0.7:
        place = int(random.integers(len(entry[key])))
        entry[key][place] = _strange(random, entry[key][place])
    else:
        entry[key] = (
            _strange(random, entry[key])
            if random.random() < 0.6
            else _one(random, ("F32", "U8", "F16", "BF16", "F64"))
        )


def header_entries(folder: Folder, random: Generator) -> None:
    first, second = _one(random, folder.header), _one(random, folder.header)
    kind = _one(random, ("drop", "rename", "swap", "copy", "value", "key"))
    if kind == "drop":
        del folder.header[first]
    elif kind == "rename":
        folder.header[
            _one(random, (first + "x", "", "__pad.x", "params", "../x", "packed/" + first, "é"))
        ] = folder.header.pop(first)
    elif kind == "swap":
        folder.header[first], folder.header[second] = folder.header[second], folder.header[first]
    elif kind == "copy":
        folder.header[first + "/copy"] = dict(folder.header[first])
    elif kind == "value":
        folder.header[first] = _strange(random)
        folder.make_right = False
    else:
        folder.header[first][_one(random, ("stride", "", "dtype"))] = _strange(random)


def metadata_tables(folder: Folder, random: Generator) -> None:
    name = _one(random, folder.metadata)
    table = folder.metadata[name]
    folder.make_right = random.random() < 0.5
    if not isinstance(table, dict) or random.random() < 0.2:
        folder.metadata[name] = _one(random, (_deep(random), json.dumps(_strange(random)), "{}", "1", "2"))
        return
    key = _one(random, table)
    kind = _one(random, ("drop", "change", "add", "inside"))
    if kind == "drop":
        del table[key]
    elif kind == "add":
        table[key + "x"] = table[key]
    elif kind == "inside" and isinstance(table[key], dict):
        field = _one(random, table[key])
        table[key][field] = _strange(random, table[key][field])
    else:
        table[key] = _strange(random, table[key])


def json_files(folder: Folder, random: Generator) -> None:
    """Changes a field of config.json or another JSON file, or the whole file."""
    name = _one(random, ["config.json", *folder.files])
    if random.random() < 0.08:
        folder.files[name] = _one(
            random, (_deep(random).encode(), b"", b"\xff", b"[]", b"{}", b'{"a": 1, "a": 2}')
        )
        return
    if random.random() < 0.02:
        del folder.files[name]
        return
    fields = json.loads(folder.files[name])
    key = _one(random, fields)
    kind = _one(random, ("change", "change", "change", "drop", "add", "other"))
    if kind == "drop":
        del fields[key]
    elif kind == "add":
        fields[_one(random, ("architecture", "x", "num_classes", "widths", "model_type", "kind"))] = _strange(
            random
        )
    elif kind == "other" and name == "config.json":
        fields["architecture"] = _one(
            random, ("mlp", "cnn", "vision_transformer", "transformer", 5, None, ["cnn"])
        )
    else:
        fields[key] = _strange(random, fields[key])
    text = json.dumps(fields)
    if random.random() < 0.1:
        text = text[:-1] + f', "{key}": 1}}'  # twice
    folder.files[name] = text.encode()


def contents(folder: Folder, random: Generator) -> None:
    """Codes outside the format, non-finite scales and parameters."""
    name = _one(random, (name for name in folder.header if not name.startswith("__pad")))
    tensor = folder.tensor(name)
    if folder.header[name]["dtype"] == "F32":
        values = np.frombuffer(tensor, np.float32)
        values[int(random.integers(values.size))] = _one(
            random, (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e-45, 3e38)
        )
    else:
        for _ in range(int(random.integers(1, 5))):
            tensor[int(random.integers(len(tensor)))] = int(random.integers(256))


def sizes(folder: Folder, random: Generator) -> None:
    kind = _one(random, ("cut", "more", "pad"))
    if kind == "cut":
        del folder.data[int(random.integers(len(folder.data))) :]
    elif kind == "more":
        folder.data += bytes(int(_one(random, (1, 63, 64, 5000))))
    else:
        pads = [name for name in folder.header if name.startswith("__pad")]
        if pads:
            folder.tensor(_one(random, pads))[0] = 1


def header_bytes(folder: Folder, random: Generator) -> None:
    strings = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in folder.metadata.items()
    }
    raw = bytearray(json.dumps(folder.header | {"__metadata__": strings}).encode())
    for _ in range(int(random.integers(1, 4))):
        raw[int(random.integers(len(raw)))] = int(
            _one(random, (random.integers(256), *b'0123456789"{}[]:,-. '))
        )
    if random.random() < 0.1:
        raw = bytearray(_deep(random).encode())
    folder.raw_header = bytes(raw)


CHANGES: dict[str, Callable[[Folder, Generator], None]] = {
    change.__name__: change
    for change in (header_numbers, header_entries, metadata_tables, json_files, contents, sizes, header_bytes)
}


def outcome(folder: Path, verify: bool | None) -> str:
    """ "loaded", or "refused: " and the reason; anything else raises an AssertionError that describes the fault."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        model = load_packed(folder, verify=verify)
    except StorageError as error:
        model, message = None, str(error)
    except Exception as error:  # any other exception is a fault
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}") from error
    seconds = time.process_time() - began
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert seconds < SECONDS, f"took {seconds:.1f} s of processor time"
    assert growth < GROWTH, f"took {growth:,} bytes of memory"
    if model is None:
        assert len(message) <= 1000, f"{len(message)} characters: {message[:200]!r}"
        assert message.isprintable(), f"not one line: {message[:200]!r}"
        return "refused"
    expected = packing.abstract(model.config)
    assert jax.tree.structure(model.variables) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(model.variables), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    for weight in jax.tree.leaves(model.variables["packed"], is_leaf=lambda leaf: hasattr(leaf, "format")):
        validate(weight, contents=verify is not False)
        assert np.isfinite(weight.scale).all()
    if model.tokenizer is not None:
        assert model.tokenizer.encode(model.tokenizer.decode([0])).tolist() == [0]
    assert max((*model.conversation.begin, *model.conversation.end), default=-1) < getattr(
        model.config, "vocab_size", 0
    )
    if model.classes is not None:
        assert len(model.classes.names) == model.config.num_classes  # type: ignore[attr-defined]
    return "loaded"


def fuzz(cases: int, seed: int, place: Path) -> dict[str, Any]:
    """Counts of outcomes by kind of change, and the faults found: [case, changes, description]."""
    good, folder = good_folders(place), place / "case"
    folder.mkdir()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults: list[list[Any]] = []
    for case in range(cases):
        random = np.random.default_rng((seed, case))  # each case can be reproduced alone
        changed = copy.deepcopy(_one(random, good))
        names = [_one(random, CHANGES) for _ in range(1 if random.random() < 0.8 else 2)]
        try:
            for name in names:
                CHANGES[name](changed, random)
        except (LookupError, TypeError, ValueError, AttributeError):
            pass  # the second change failed on the folder left by the first one
        changed.write(folder)
        try:
            found = outcome(folder, _one(random, (None, True, False)))
        except (AssertionError, ValueError) as fault:
            found = "fault"
            faults.append([case, names, str(fault)])
        counts[names[0]][found] += 1
    return {
        "cases": cases,
        "seed": seed,
        "outcomes": {name: dict(count) for name, count in sorted(counts.items())},
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        found = fuzz(args.cases, args.seed, Path(place))
    found["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(found, indent=2)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
