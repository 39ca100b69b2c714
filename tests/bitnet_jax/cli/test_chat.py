"""`generate --chat`, end tokens and begin tokens of a Hugging Face folder, and of packed copies of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.data.chat_template import chat_ids
from bitnet_jax.inference.streaming import stream
from bitnet_jax.model_folders import load_model
from bitnet_jax.packed.storage import load_packed, save_packed
from tests.bitnet_jax.chat_folders import ANSWER, BEGIN, END, STOP, TEMPLATE, adds, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chat") / "model")


def generated(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["generate", *words]) == 0
    return capsys.readouterr().out


def test_chat_prints_the_answer_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [
        str(folder),
        "--chat",
        "--prompt",
        "What?",
        "--tokens",
        "30",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    assert generated(chat, capsys) == ANSWER + "\n"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["prompt"], figures["text"]) == ("What?", ANSWER)
    assert figures["tokens"] == len(ANSWER.encode()) + 1
    assert generated([*chat, "--system", "Answer."], capsys) == ANSWER + "\n"


def test_each_of_two_end_tokens_ends_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only </s>, the first known name in the vocabulary, used to end it: the model ran on."""
    assert generated([str(folder), "--prompt", "H", "--tokens", "30"], capsys) == ANSWER[1:] + "\n"
    assert generated([str(folder), "--prompt", "?", "--tokens", "30"], capsys) == "\n"
    model = load_model(folder)
    assert model.conversation.end == (END, STOP)


def test_the_message_is_encoded_with_special_tokens(folder: Path) -> None:
    model = load_model(folder)
    assert model.tokenizer is not None
    ids = chat_ids(model.tokenizer, model.conversation, [{"role": "user", "content": " Hi\n"}]).tolist()
    text = [*b"system\nBe brief.", *b"user\nHi", *b"assistant\n"]
    assert [i for i in ids if i < 256 and i != 10] == [i for i in text if i != 10]
    assert [i for i in ids if i >= 256] == [257, 258, 257, 258, 257]
    system = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Hi"}]
    assert b"Be brief." not in bytes(
        i for i in chat_ids(model.tokenizer, model.conversation, system).tolist() if i < 256
    )


def test_no_piece_of_an_answer_ends_inside_a_character(folder: Path) -> None:
    model = load_model(folder)
    ids = np.array(list(b"\n"), np.int32)
    pieces = list(
        stream(
            model.config, model.variables, model.tokenizer, ids,
            max_new_tokens=30, conversation=model.conversation, chunk=1,
        )
    )  # fmt: skip
    assert [piece for piece in pieces if piece] == list(ANSWER)


def test_begin_tokens_precede_a_prompt_but_not_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"bos_token": "<s>", "chat_template": "{{ bos_token }}" + TEMPLATE}
    folder = write_folder(tmp_path / "model", {"tokenizer_config.json": settings}, post_processor=adds(BEGIN))
    seen: list[list[int]] = []

    def spy(config: object, variables: object, tokens: np.ndarray, *args: object, **kwargs: object) -> object:
        seen.append(np.asarray(tokens)[0].tolist())
        return iter([np.array([[END]])])

    monkeypatch.setattr("bitnet_jax.inference.streaming.stream_tokens", spy)
    assert cli.main(["generate", str(folder), "--prompt", "Hi", "--tokens", "5"]) == 0
    assert cli.main(["generate", str(folder), "--prompt", "", "--tokens", "5"]) == 0
    assert cli.main(["generate", str(folder), "--chat", "--prompt", "Hi", "--tokens", "5"]) == 0
    assert seen[0] == [BEGIN, *b"Hi"]
    assert seen[1] == [BEGIN], "begin tokens are enough to begin with"
    assert seen[2].count(BEGIN) == 1
    assert seen[2][0] == BEGIN
    capsys.readouterr()


def test_info_shows_what_a_model_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", str(folder), "--json", str(tmp_path / "info.json")]) == 0
    out = capsys.readouterr().out
    assert f"begin tokens: none; end tokens: {END}, {STOP}\n" in out
    assert f"chat template: yes, {len(TEMPLATE)} characters: {TEMPLATE[:20]}" in out
    assert json.loads((tmp_path / "info.json").read_text())["conversation"]["end"] == [END, STOP]


def test_a_packed_copy_answers_alike(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(folder)
    save_packed(
        tmp_path / "p", model.variables, model.config, model.tokenizer, conversation=model.conversation
    )
    assert (
        load_packed(tmp_path / "p").conversation
        == load_model(tmp_path / "p").conversation
        == model.conversation
    )
    assert (
        generated([f"{tmp_path}/p", "--chat", "--prompt", "What?", "--tokens", "30"], capsys) == ANSWER + "\n"
    )


@pytest.mark.extended
def test_a_run_and_its_packed_model_say_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, packed = load_model(place / "run").conversation, load_model(place / "packed").conversation
    assert run == packed
    assert (run.begin, run.end, run.begins_prompts) == ((0,), (0,), False)
    assert cli.main(["info", f"{place}/packed"]) == 0
    out = capsys.readouterr().out
    assert "begin tokens: 0 (of documents, not of prompts); end tokens: 0\n" in out
    assert "chat template: no\n" in out


@pytest.mark.extended
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{place}/packed", "--chat", "--prompt", "A"], "got a model without a chat template"),
        (["{place}/packed", "--system", "A", "--prompt", "A"], "got --system without --chat"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", *(word.format(place=place) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_failing_template_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(
        tmp_path / "model", {"chat_template.jinja": "{{ raise_exception('No system role') }}"}
    )
    assert cli.main(["generate", str(folder), "--chat", "--prompt", "A"]) == 2
    assert capsys.readouterr().err == "error: chat template: TemplateError: No system role\n"
