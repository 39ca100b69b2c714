"""`bitnet-jax serve` and `bitnet-jax chat` as processes, on a model that answers every message with one text."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_jax.cli import main as cli
from tests.bitnet_jax.chat_folders import ANSWER, write_folder

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
COMMAND = [sys.executable, "-m", "bitnet_jax.cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chat") / "model")


def test_chat_answers_each_line_of_its_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What?\n/reset is no command here\n")))
    assert cli.main(["chat", str(folder)]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}\n"


def test_chat_needs_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_folder(tmp_path / "plain", {"tokenizer_config.json": {}})
    assert cli.main(["chat", str(plain)]) == 2
    assert "without a chat template" in capsys.readouterr().err


@pytest.mark.extended
def test_chat_on_a_terminal(folder: Path) -> None:
    """Ctrl-C at the prompt and Ctrl-D; what the screen shows."""
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", str(folder)],
        stdin=terminal, stdout=terminal, stderr=terminal, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    screen, seen = "", 0

    def shows(text: str, seconds: float) -> bool:
        """Whether it is shown within the time, after what was waited for before."""
        nonlocal screen, seen
        while text not in screen[seen:]:
            if not select.select([master], [], [], seconds)[0]:
                return False
            try:
                screen += os.read(master, 4096).decode(errors="replace")
            except OSError:  # the program has ended
                return False
        seen = screen.index(text, seen) + len(text)
        return True

    try:
        assert shows("> ", 120), screen
        # Python loses an interrupt that comes between the prompt and its wait for input, so it is pressed until it acts
        for _ in range(60):
            process.send_signal(signal.SIGINT)
            if shows("Ctrl-D or /exit leaves", 1):
                break
        else:
            pytest.fail(screen)
        os.write(master, b"What?\n")
        assert shows("prompt tokens cached]", 120), screen
        assert ANSWER in screen
        os.write(master, b"/nonsense\n")
        assert shows("/nonsense, which is no command", 120), screen
        while process.poll() is None:
            with contextlib.suppress(OSError):
                os.write(master, b"\x04")
            shows("nothing more, but the screen is read", 1)
        assert process.returncode == 0, screen
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.extended
def test_serve_says_where_it_listens_and_stops_on_a_signal(folder: Path) -> None:
    pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
    pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
    process = subprocess.Popen(
        [*COMMAND, "serve", str(folder), "--port", "0", "--slots", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving model at http://127.0.0.1:"), process.stderr
        assert line.endswith(" (2 slots of 256 tokens)\n")
        link = http.client.HTTPConnection(line.split()[3].removeprefix("http://"), timeout=60)
        messages = [{"role": "user", "content": "What?"}]
        body = json.dumps({"model": "model", "messages": messages, "temperature": 0})
        link.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = json.loads(link.getresponse().read())
        assert answer["choices"][0]["message"]["content"] == ANSWER
        assert answer["choices"][0]["finish_reason"] == "stop"
        link.close()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error.splitlines()[-1]) == (130, "interrupted")
        assert "Traceback" not in error
    finally:
        process.kill()


def test_serve_refuses_what_it_cannot_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
    pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
    assert cli.main(["serve", str(write_folder(tmp_path / "model")), "--api-key", ""]) == 2
    assert "got an empty API key" in capsys.readouterr().err
