"""Begin and end tokens of models trained here, and conversation.json."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bitnet_jax.data import ByteTokenizer, CharTokenizer, DataError
from bitnet_jax.data.conversation import MAX_TEMPLATE, Conversation, of_documents, prompt_ids

FULL = Conversation((5, 6), (7, 0), "{{ bos_token }}é", (("bos_token", "<s>"), ("eos_token", "</s>")), False)


@pytest.mark.parametrize("conversation", [FULL, Conversation()])
def test_json_round_trip(conversation: Conversation) -> None:
    assert Conversation.from_json(conversation.to_json()) == conversation


def test_documents_begin_and_end_with_the_separator() -> None:
    """A prompt may be the middle of a document: it is continued as it is."""
    trained = of_documents(ByteTokenizer())
    assert (trained.begin, trained.end, trained.template) == ((0,), (0,), None)
    assert prompt_ids(ByteTokenizer(), trained, "a").tolist() == [97]
    assert of_documents(CharTokenizer("ab")) == of_documents(None) == Conversation()


def test_a_prompt_follows_the_begin_tokens() -> None:
    ids = prompt_ids(ByteTokenizer(), Conversation(begin=(1, 2)), "a")
    assert (ids.tolist(), ids.dtype) == ([1, 2, 97], np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"begin": (-1,)}, "begin: got (-1,), expected token ids"),
        ({"end": (True,)}, "end: got (True,)"),
        ({"end": 5}, "end: got 5"),
        ({"end": (2**31,)}, "end: got"),
        ({"template": 5}, "template: got int"),
        ({"template": "x" * (MAX_TEMPLATE + 1)}, f"template: got {MAX_TEMPLATE + 1} characters"),
        ({"special_tokens": (("a b", "x"),)}, "special_tokens: got ('a b', 'x')"),
        ({"special_tokens": (("messages", "x"),)}, "special_tokens: got ('messages', 'x')"),
        ({"special_tokens": (("bos_token", 5),)}, "special_tokens: bos_token: got 5"),
        ({"begins_prompts": 1}, "begins_prompts: got 1"),
    ],
)
def test_invalid_fields_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        Conversation(**change)
    assert message in str(caught.value)
    fields = json.loads(Conversation().to_json()) | change
    fields["special_tokens"] = dict(fields["special_tokens"])
    with pytest.raises(DataError, match=r"^conversation\.json: "):
        Conversation.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"begin": []}', "[" * 100_000])
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"^conversation\.json: "):
        Conversation.from_json(text)
    wrong = json.dumps(json.loads(Conversation().to_json()) | {"special_tokens": [["bos_token", "x"]]})
    with pytest.raises(DataError, match="special_tokens: got list"):
        Conversation.from_json(wrong)
