"""Hugging Face folders with one damaged file: a model or one line, whatever the file; a fixed number of mutations.

Mutations of the other formats: test_safetensors_folder.py, test_gguf_file.py, test_gguf.py (metadata),
data/test_tokenizers.py, data/test_chat_template.py (hostile templates), packed/test_damaged_folders.py and
tests/robustness (packed folders).
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.model_folders import load_model, source_path
from tests.bitnet_jax.chat_folders import BEGIN, TEMPLATE, adds, write_folder

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MUTATIONS = 60  # of each file
HOSTILE = (
    None, True, -1, 0, 2**31, 2**63, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\ud800", [], [[]], [-1, 2**40],
    {}, {"a": {"b": []}}, [{}] * 50,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(
        tmp_path_factory.mktemp("mutated") / "m",
        files={"chat_template.jinja": TEMPLATE},
        post_processor=adds(BEGIN),
    )


def mutated(content: bytes, generator: random.Random, is_json: bool) -> bytes:
    """One damage: a hostile value of a JSON field, changed, removed or repeated bytes, or bytes that are not UTF-8."""
    if is_json and generator.random() < 0.6:
        tree = json.loads(content)
        place: Any = tree
        while True:  # a random field at a random depth
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = generator.choice(keys)
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or generator.random() < 0.4:
                break
            place = inner
        place[key] = generator.choice(HOSTILE)
        return json.dumps(tree).encode()
    changed, at = bytearray(content), generator.randrange(len(content))
    how = generator.randrange(4)
    if how == 0:
        changed[at] ^= 1 << generator.randrange(8)
    elif how == 1:
        del changed[at : at + generator.randrange(1, 40)]
    elif how == 2:
        changed[at:at] = changed[at : at + 20] * 3
    else:
        changed[at:at] = generator.choice([b"\xff\xfe", b"\xc3", b"\0", b"[" * 3000, b'{"a":' * 3000])
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_is_read_or_refused_in_one_line(folder: Path, name: str) -> None:
    file = folder / name
    content, generator = file.read_bytes(), random.Random(name)
    messages: list[str] = []
    try:
        for _ in range(MUTATIONS):
            file.write_bytes(mutated(content, generator, name.endswith(".json")))
            messages += read(folder)
    finally:
        file.write_bytes(content)
    assert [text for text in messages if not text.strip() or "\n" in text or len(text) > 2000] == []
    assert len(messages) > MUTATIONS // 10
    assert read(folder) == []


def read(folder: Path) -> list[str]:
    """The message if the folder is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_model(folder)
    except (ValueError, OSError, RuntimeError) as error:
        return [str(error)]
    assert model.tokenizer is None or model.tokenizer.vocab_size <= model.config.vocab_size
    assert all(0 <= i < model.config.vocab_size for i in (*model.conversation.begin, *model.conversation.end))
    return []


@pytest.mark.parametrize("seed", range(20))
def test_names_of_packages_are_found_or_refused_in_one_line(seed: int) -> None:
    generator = random.Random(seed)
    letters = "ab.-_/\\:; \n\0é🙂%~[]=<>"
    for length in (0, 1, 2, 5, 300):
        name = "".join(generator.choice(letters) for _ in range(length))
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            source_path(f"pypi:{name}")
        assert "pypi:" in str(caught.value)


def test_a_package_without_a_list_of_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda package: None)
    with pytest.raises(FileNotFoundError, match="pypi:numpy with 0 .gguf files"):
        source_path("pypi:numpy")
