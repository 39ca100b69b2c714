"""The conversation in the terminal: what is remembered, commands, and an answer that Ctrl-C ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitnet_jax.data.conversation import Conversation
from bitnet_jax.serving.requests import Finished
from bitnet_jax.serving.terminal import Chat, describe, turns
from tests.bitnet_jax.serving.tiny_models import engine

pytest.importorskip("jinja2", reason="package jinja2 is not installed; pip install jinja2")
CONVERSATION = Conversation(template="{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}")


@pytest.fixture
def chat() -> Iterator[Chat]:
    serving = engine(slots=1)
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    yield Chat(serving, CONVERSATION, system="Be brief.", max_tokens=5)
    serving.close()
    thread.join()


def test_a_conversation_is_remembered_saved_and_loaded(chat: Chat, tmp_path: Path) -> None:
    shown: list[str] = []
    first = chat.ask("Hello", shown.append)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[2]["content"] == "".join(shown)
    assert chat.ask("Again", shown.append).cached_tokens >= first.prompt_tokens
    file = tmp_path / "saved.json"
    assert chat.command(f"/save {file}") == ""
    messages = chat.messages
    with pytest.raises(FileExistsError):
        chat.command(f"/save {file}")
    assert chat.command("/reset") == ""
    assert chat.messages == messages[:1]
    assert chat.command(f"/load {file}") == "5 messages"
    assert chat.messages == messages
    assert "10 tokens generated" in chat.command("/stats")
    chat.command("/system Answer in verse.")
    assert chat.messages == [{"role": "system", "content": "Answer in verse."}]
    chat.command("/system")
    assert chat.messages == []


def test_what_cannot_be_done_leaves_the_conversation_as_it_was(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"messages": [{"role": 1}]}')
    before = list(chat.messages)
    for line, message in [
        ("/nonsense", "got /nonsense, which is no command"),
        ("/save", "got /save without a file"),
        (f"/load {tmp_path}/other.json", "got no list of messages"),
    ]:
        with pytest.raises(ValueError, match=message):
            chat.command(line)
    with pytest.raises(ValueError, match="expected at most 160; shorten the prompt"):
        chat.ask("long " * 100, print)
    assert chat.messages == before


def test_an_interrupt_ends_the_answer_and_keeps_what_was_shown(chat: Chat) -> None:
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 1:
            raise KeyboardInterrupt

    chat._max_tokens = 100
    finished = chat.ask("Hello", show)
    assert finished.reason == "cancelled"
    assert finished.completion_tokens < 100
    assert ", interrupted]" in describe(finished)
    assert chat.ask("Go on", shown.append).reason == "length"


def test_lines_and_descriptions() -> None:
    lines = iter(["one", "two \\", "lines", "open \\"])
    assert list(turns(lambda: next(lines, None))) == ["one", "two \nlines", "open \n"]
    finished = Finished("length", 20, 11, 15, first_seconds=0.5, seconds=2.5)
    assert describe(finished) == (
        "[11 tokens, 5.0 tokens/s; first after 0.50 s, 15 of 20 prompt tokens cached, cut at its length]"
    )
