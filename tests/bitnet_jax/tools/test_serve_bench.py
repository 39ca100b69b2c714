"""The bench of the server: its figures by hand, on a real server, and its refusal of wrong answers."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.cli import main as cli
from bitnet_jax.tools import serve_bench
from bitnet_jax.tools.serve_bench import Address, Asked
from tests.bitnet_jax.chat_folders import write_folder


def test_the_figures_of_a_window_in_which_all_clients_are_at_work() -> None:
    def asked(sent: float, *times: float, tokens: int) -> Asked:
        return Asked((1,), "text", sent, times, tokens)

    first = [asked(0, 1, 2, 3, tokens=6), asked(3, 4, 6, tokens=2)]
    second = [asked(2, 4, 5, tokens=2)]
    figures = serve_bench._figures([first, second])
    # From 2, when the second client is there, to 5, when it is done: 2 chunks of 2 tokens, and 3 of 1.
    assert figures["tokens_per_second"] == pytest.approx((2 * 2 + 1 + 2) / 3)
    assert figures["first_token_seconds"] == pytest.approx({"median": 1, "p95": 1.9})
    assert figures["between_tokens_seconds"] == pytest.approx({"median": 1, "p95": 1.85})
    assert (figures["answers"], figures["tokens"]) == (3, 10)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server in this process instead of one that the bench starts."""
    for package in ("starlette", "uvicorn", "prometheus_client", "jinja2"):
        pytest.importorskip(package, reason=f"package {package} is not installed")
    from tests.bitnet_jax.serving.tiny_servers import started

    server = started()
    host, port = server.address.removeprefix("http://").split(":")

    @contextlib.contextmanager
    def running(*_: Any) -> Iterator[Address]:
        yield Address(host, int(port), "tiny", os.getpid())

    monkeypatch.setattr(serve_bench, "_server", running)
    yield
    server.stop()


def test_every_client_asks_and_every_answer_is_compared(
    address: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"prompt": 20, "new_tokens": 6, "repeats": 2, "clients": (1, 3)}
    figures = serve_bench.bench_serving("tiny", **options)
    assert {count: level["answers"] for count, level in figures["clients"].items()} == {"1": 2, "3": 6}
    assert figures["identical_answers"] == 4 * 3
    assert figures["peak_rss_bytes"] is None or figures["peak_rss_bytes"] > 1 << 20
    assert {"commit", "processor"} <= set(figures["provenance"])
    assert "12 answers, each with the bytes" in serve_bench.table(figures)
    ask, asked = serve_bench._ask, []

    def wrong(*arguments: Any) -> Asked:
        asked.append(ask(*arguments))
        return asked[-1]._replace(text="another") if len(asked) == 15 else asked[-1]

    monkeypatch.setattr(serve_bench, "_ask", wrong)
    with pytest.raises(ValueError, match="and 'another' to the same request alone"):
        serve_bench.bench_serving("tiny", **options)


@pytest.mark.extended
def test_the_command_starts_a_server_and_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setattr(serve_bench, "CLIENTS", (1, 2))
    folder = write_folder(tmp_path / "model")
    command = ["bench", "--serve", str(folder), "--prompt", "8", "--generate", "3", "--repeats", "1"]
    assert cli.main([*command, "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["model"], figures["slots"], set(figures["clients"])) == ("model", 2, {"1", "2"})
    capsys.readouterr()
    assert cli.main([*command, "--quick"]) == 2
    assert "got --serve with --quick" in capsys.readouterr().err
    assert cli.main(["bench", "--serve", str(tmp_path / "missing")]) == 2
    assert "the server did not start: " in capsys.readouterr().err
