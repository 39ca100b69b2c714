"""Chat templates: the text and tokens of published ones, and no harm from hostile ones."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path

import pytest

from bitnet_jax.data import DataError, JsonTokenizer, chat_template
from bitnet_jax.data.chat_template import chat_ids, render
from bitnet_jax.data.conversation import Conversation

HELLO = [{"role": "user", "content": "Hello"}]
# Of BitNet b1.58 2B-4T, as its model card describes it: `Role: ` + stripped content + <|eot_id|> for each message.
BITNET = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def test_the_bitnet_template_gives_the_published_text_and_tokens(oracles: Path) -> None:
    tokenizer = JsonTokenizer((oracles / "tokenizer" / "tokenizer.json").read_text())
    conversation = Conversation(
        begin=(128_000,), template=BITNET, special_tokens=(("bos_token", "<|begin_of_text|>"),)
    )
    cases = json.loads((oracles / "tokenizer" / "chat_cases.json").read_text())
    assert len(cases) == 4
    for case in cases:
        text = render(conversation, case["messages"], add_generation_prompt=case["add_generation_prompt"])
        assert text == case["text"]
        assert tokenizer.encode(text).tolist() == case["ids"]
        if case["add_generation_prompt"]:  # no second begin token
            assert chat_ids(tokenizer, conversation, case["messages"]).tolist() == case["ids"]


# Of SmolLM2-135M-Instruct, which inserts a system message.
SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def test_the_smollm2_template_gives_the_texts_of_transformers(oracles: Path) -> None:
    cases = json.loads((oracles / "smollm2" / "cases.json").read_text())["cases"]
    chats = [case for case in cases if "messages" in case]
    assert len(chats) >= 5
    for case in chats:
        assert render(Conversation(template=SMOLLM2), case["messages"]) == case["formatted"]


def test_all_published_texts_of_the_tokenizer(oracles: Path) -> None:
    tokenizer = JsonTokenizer((oracles / "tokenizer" / "tokenizer.json").read_text())
    cases = json.loads((oracles / "tokenizer" / "cases.json").read_text())
    assert len(cases) == 47
    assert [tokenizer.encode(case["text"]).tolist() for case in cases] == [case["ids"] for case in cases]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if true %}\n  {{ 'a' }}\n  {% endif %}\n{{ 'b' }}", "  a\nb"),  # trim_blocks and lstrip_blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        ("{{ strftime_now('%Y') }}", str(datetime.date.today().year)),
        ("{{ tools is none }}{{ documents is none }}{{ absent }}", "TrueTrue"),
        ("{{ bos_token }}", "<s>"),
        ("{{ '{0.__class__}'.format(1) }}{{ raise_exception.__globals__ }}", ""),  # nothing behind attributes
    ],
)
def test_the_environment_is_that_of_transformers(template: str, expected: str) -> None:
    conversation = Conversation(template=template, special_tokens=(("bos_token", "<s>"),))
    assert render(conversation, HELLO) == expected


DOUBLED = (
    "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = DOUBLE %}{% endfor %}{{ ns.a }}"
)
HOSTILE = {
    "attributes": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    "changed messages": ("{{ messages.append(1) }}", "access to attribute 'append'"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "a long range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "a long output": (
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "output of more than 1048576",
    ),
    "a long text": ("{{ 'x' * 10 ** 11 }}", "more than 268435456 bytes of memory"),
    "a doubled text": (DOUBLED.replace("DOUBLE", "ns.a ~ ns.a"), "more than 268435456 bytes of memory"),
    "recursion": ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
    "nesting": ("{% if 1 %}" * 5000, "recursion depth"),
    "an undefined name": ("{{ a.b }}", "'a' is undefined"),
    "a syntax error": ("a\n{% for %}", "line 2: Expected an expression"),
    "an unknown tag": ("{% nothing %}", "line 1: Encountered unknown tag"),
    "its own error": ("{{ raise_exception('no system\\nmessages\x1b[2J') }}", r"no system messages\?\[2J"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_ends_with_one_line(case: str) -> None:
    template, message = HOSTILE[case]
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        render(Conversation(template=template), HELLO)
    assert str(caught.value).startswith("chat template: ")
    assert str(caught.value).isprintable()
    assert time.monotonic() - began < chat_template.WALL_SECONDS


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        DOUBLED.replace("DOUBLE", "[ns.a, ns.a]"),  # 2 ** 60 texts when written
    ],
)
def test_a_template_that_does_not_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    with pytest.raises(
        DataError, match="chat template: (stopped after 1 s of processor time|got more than .* memory)"
    ):
        render(Conversation(template=template), HELLO)


def test_a_template_that_waits_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not limit processor time, the clock does."""
    monkeypatch.setattr(chat_template, "WALL_SECONDS", 0.001)
    with pytest.raises(DataError, match=r"chat template: did not finish within 0\.001 s"):
        render(Conversation(template="x"), HELLO)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="got a model without a chat template"):
        render(Conversation(), HELLO)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="package jinja2, which renders chat templates, is not installed"):
        render(Conversation(template="x"), HELLO)
