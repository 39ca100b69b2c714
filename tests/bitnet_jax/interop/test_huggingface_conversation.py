"""Begin and end tokens and templates of Hugging Face folders: which file states them, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.data import JsonTokenizer
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.interop.huggingface_conversation import read
from tests.bitnet_jax.chat_folders import BEGIN, END, STOP, TEMPLATE, UNUSED_END, adds, tokenizer_json

SIZE = 264


def conversation(folder: Path, files: dict[str, Any], **tokenizer: Any) -> Conversation:
    """What a folder with these files and fields of tokenizer.json states."""
    text = tokenizer_json(**tokenizer)
    for name, content in ({"tokenizer.json": text} | files).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return read(folder, SIZE, JsonTokenizer(text))


@pytest.mark.parametrize(
    ("generation", "config", "named", "expected"),
    [
        ([END, STOP], 5, "</s>", (END, STOP)),
        (END, [5, 6], "</s>", (END,)),
        (None, [END, STOP, END], "</s>", (END, STOP)),
        (None, 0, "</s>", (0,)),
        (None, None, "</s>", (UNUSED_END,)),
        (None, None, {"content": "<|im_end|>", "lstrip": False}, (END,)),
        (None, None, None, ()),  # although the vocabulary has </s>
    ],
)
def test_end_tokens(
    generation: Any, config: Any, named: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    files = {
        "generation_config.json": {"eos_token_id": generation},
        "config.json": {"eos_token_id": config},
        "tokenizer_config.json": {"eos_token": named},
    }
    assert conversation(tmp_path, files).end == expected


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        (adds(BEGIN), {}, (BEGIN,)),
        (adds(BEGIN), {"add_bos_token": False, "bos_token": "<s>"}, (BEGIN,)),  # as transformers 5
        (adds(BEGIN, STOP), {}, (BEGIN, STOP)),
        (adds(), {"add_bos_token": True, "bos_token": "<s>"}, ()),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, adds(BEGIN)]}, {}, (BEGIN,)),
        (BYTE_LEVEL, {"bos_token": "<s>"}, ()),
        (BYTE_LEVEL, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, (BEGIN,)),
        (None, {"add_bos_token": True, "bos_token": "<s>"}, (BEGIN,)),
        (None, {"add_bos_token": False, "bos_token": "<s>"}, ()),
        (None, {"add_bos_token": None}, ()),
    ],
)
def test_begin_tokens(processor: Any, settings: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    stated = conversation(tmp_path, {"tokenizer_config.json": settings}, post_processor=processor)
    assert stated.begin == expected
    assert stated.begins_prompts


def test_begin_tokens_are_what_the_library_adds(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    stated = conversation(tmp_path, {}, post_processor=adds(BEGIN, STOP))
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tuple(library.encode("a").ids) == (*stated.begin, ord("a"))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": TEMPLATE}}, TEMPLATE),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "é\r\n"}, "é\r\n"),
        ({"chat_template.jinja": "b"}, "b"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "a"},
                        {"name": "default", "template": "b"},
                    ]
                }
            },
            "b",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "a"}]}}, None),
        ({"tokenizer_config.json": {}}, None),
        ({}, None),
    ],
)
def test_templates(files: dict[str, Any], expected: str | None, tmp_path: Path) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path, SIZE, None).template == expected


def test_named_tokens_are_variables_of_the_template(tmp_path: Path) -> None:
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "pad_token": None,
        "model_max_length": 5,
    }
    stated = conversation(tmp_path, {"tokenizer_config.json": settings})
    assert stated.special_tokens == (("bos_token", "<s>"), ("eos_token", "</s>"))


@pytest.mark.parametrize(
    ("files", "tokenizer", "message"),
    [
        (
            {"generation_config.json": {"eos_token_id": SIZE}},
            {},
            "generation_config.json: eos_token_id: got '264'",
        ),
        (
            {"generation_config.json": {"eos_token_id": [1, -1]}},
            {},
            "generation_config.json: eos_token_id: got '-1'",
        ),
        (
            {"generation_config.json": {"eos_token_id": True}},
            {},
            "generation_config.json: eos_token_id: got 'True'",
        ),
        ({"config.json": {"eos_token_id": "2"}}, {}, "config.json: eos_token_id: got '2'"),
        ({"config.json": {"eos_token_id": {}}}, {}, "config.json: eos_token_id: got '{}'"),
        ({"config.json": {"eos_token_id": [[1]]}}, {}, "config.json: eos_token_id: got '[1]'"),
        ({"generation_config.json": "{"}, {}, "generation_config.json: not valid JSON"),
        ({"generation_config.json": "[]"}, {}, "generation_config.json: got a JSON list"),
        ({"tokenizer_config.json": "[" * 9999}, {}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config.json": {"eos_token": 5}}, {}, "tokenizer_config.json: eos_token: got '5'"),
        ({"tokenizer_config.json": {"eos_token": {}}}, {}, "tokenizer_config.json: eos_token: got '{}'"),
        ({"tokenizer_config.json": {"eos_token": "<x>"}}, {}, "tokenizer_config.json: eos_token: got '<x>'"),
        (
            {"tokenizer_config.json": {"add_bos_token": 1}},
            {},
            "tokenizer_config.json: add_bos_token: got '1'",
        ),
        ({"tokenizer_config.json": {"add_bos_token": True}}, {}, "add_bos_token is true without a bos_token"),
        ({"tokenizer_config.json": {"add_eos_token": True}}, {}, "add_eos_token is true"),
        (
            {"tokenizer_config.json": {"chat_template": 5}},
            {},
            "tokenizer_config.json: chat_template: got int",
        ),
        (
            {"tokenizer_config.json": {"chat_template": ["a"]}},
            {},
            "chat_template: got a list of other things",
        ),
        ({}, {"post_processor": adds(BEGIN, after=(END,))}, f"adds the tokens [{END}] after every text"),
        (
            {},
            {
                "post_processor": {
                    "type": "BertProcessing",
                    "sep": ["</s>", UNUSED_END],
                    "cls": ["<s>", BEGIN],
                }
            },
            "tokenizer.json: post_processor: got BertProcessing",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_file_and_field(
    files: dict[str, Any], tokenizer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        conversation(tmp_path, files, **tokenizer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_begin_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(post_processor=adds(STOP)))
    with pytest.raises(ValueError, match="post_processor: got '259', expected token ids from 0 to 258"):
        read(tmp_path, 259, None)
    (tmp_path / "tokenizer.json").write_text('{"post_processor": {"type": "Sequence", "processors": 5}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: post_processor: got an unknown structure"):
        read(tmp_path, 259, None)


def test_a_damaged_template_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: got byte 0xff"):
        read(tmp_path, SIZE, None)
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * (1 << 21))
    with pytest.raises(ValueError, match=r"chat_template\.jinja: got more than"):
        read(tmp_path, SIZE, None)
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * (1 << 19))
    with pytest.raises(ValueError, match="template: got 524288 characters"):
        read(tmp_path, SIZE, None)
