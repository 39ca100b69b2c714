"""Throughput and latency of the server, asked by several clients at once over HTTP; it runs as a separate process.

    figures = bench_serving("smollm2-packed", prompt=128, new_tokens=64, repeats=3)

For each number of clients, every client sends one request after another: first one that is not measured, then
`repeats`. All prompts differ, so that none is found in the cache. The window of the throughput begins when every client
has sent its first measured request and ends when the first client has its last answer, so that all are at work in it.
Afterwards each request is sent again while nothing else runs; if any answer differs, there are no figures.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitnet_jax.progress import Progress, progress_bar
from bitnet_kernels.machine import provenance

CLIENTS = (1, 4, 8, 16)
WAIT_SECONDS = 600.0  # for one answer


class Asked(NamedTuple):
    """A request and its answer. Times are those of time.perf_counter, one for each chunk with text."""

    prompt: tuple[int, ...]
    text: str
    sent: float
    times: tuple[float, ...]
    tokens: int


class Address(NamedTuple):
    host: str
    port: int
    model: str
    pid: int


def bench_serving(
    model: str,
    *,
    prompt: int,
    new_tokens: int,
    repeats: int = 5,
    kv_format: str | None = None,
    clients: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The figures of `bitnet-jax serve MODEL`, shown by `table`.

    Args:
      model: whatever `bitnet-jax serve` takes.
      prompt: tokens of each prompt.
      new_tokens: most tokens of an answer; an end token ends it earlier.
      repeats: measured requests of each client.
      clients: numbers of clients to measure, None: CLIENTS; the server has as many slots as the largest.

    Raises:
      ValueError: fewer than 2 new tokens or 1 repeat; the server does not start, refuses a request, or gives an answer
        that differs from the one to the same request alone.
    """
    if new_tokens < 2 or repeats < 1 or prompt < 1:
        raise ValueError(
            f"got {prompt} prompt tokens, {new_tokens} new tokens and {repeats} repeats, expected at least 1, 2 and 1"
        )
    clients = clients or CLIENTS
    slots, context = max(clients), prompt + new_tokens
    total = 2 * sum(clients) * (repeats + 1)
    with (
        _server(model, slots, context, kv_format) as server,
        progress_bar(total, unit="answers", description="serving") as progress,
    ):
        levels = {}
        answers: list[Asked] = []
        for count in clients:
            asked = _level(server, count, repeats, prompt, new_tokens, progress)
            answers += [each for one in asked for each in one]
            levels[str(count)] = _figures([one[1:] for one in asked])
        peak = _peak_rss(server.pid)
        for asked_together in answers:
            alone = _ask(server, asked_together.prompt, new_tokens)
            progress.update()
            if alone.text != asked_together.text:
                raise ValueError(
                    f"the server answered {asked_together.text[:40]!r} among other requests and {alone.text[:40]!r} to "
                    "the same request alone, expected the same; no figures are reported of wrong answers"
                )
    return {
        "clients": levels,
        "identical_answers": len(answers),
        "peak_rss_bytes": peak,
        "model": server.model,
        "slots": slots,
        "context": context,
        "kv_format": kv_format,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "provenance": provenance(),
    }


@contextlib.contextmanager
def _server(model: str, slots: int, context: int, kv_format: str | None) -> Iterator[Address]:
    command = [sys.executable, "-m", "bitnet_jax.cli", "serve", model, "--port", "0"]
    command += ["--slots", str(slots), "--context", str(context)]
    command += [] if kv_format is None else ["--kv-format", kv_format]
    environment = {name: value for name, value in os.environ.items() if name != "BITNET_JAX_API_KEY"}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("serving "):
                process.wait()
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                raise ValueError(f"the server did not start: {''.join(last) or 'without a message'}")
            name, address = line.removeprefix("serving ").split(" at http://")
            host, port = address.split()[0].rsplit(":", 1)
            yield Address(host, int(port), name, process.pid)
        finally:
            process.terminate()
            process.wait()
            if process.stdout:
                process.stdout.close()


def _level(
    server: Address, count: int, repeats: int, prompt: int, new_tokens: int, progress: Progress
) -> list[list[Asked]]:
    """The answers of each client, the first of which is not measured."""
    start, lock = threading.Barrier(count), threading.Lock()
    prompts = [
        [_prompt(server, f"{count} {client} {i}", prompt) for i in range(repeats + 1)]
        for client in range(count)
    ]

    def work(client: int) -> list[Asked]:
        start.wait()
        answers = []
        for tokens in prompts[client]:
            answers.append(_ask(server, tokens, new_tokens))
            with lock:
                progress.update()
        return answers

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def _prompt(server: Address, seed: str, length: int) -> tuple[int, ...]:
    """Tokens of random words; those of other seeds differ within a few characters."""
    source = random.Random(seed)
    words = ("".join(source.choices(string.ascii_lowercase, k=source.randint(2, 8))) for _ in range(length))
    with contextlib.closing(_post(server, "/tokenize", {"content": " ".join(words)})) as link:
        return tuple(json.loads(link.getresponse().read())["tokens"][:length])


def _ask(server: Address, prompt: tuple[int, ...], new_tokens: int) -> Asked:
    body = {
        "model": server.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent = time.perf_counter()
    with contextlib.closing(_post(server, "/v1/completions", body)) as link:
        answer = link.getresponse()
        if answer.status != 200:
            raise ValueError(f"the server refused a request: {answer.read().decode(errors='replace')[:300]}")
        text, times, tokens = [], [], 0
        for line in answer:
            now = time.perf_counter()
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                raise ValueError(f"an answer ended early: {chunk['error']['message']}")
            tokens = chunk["usage"]["completion_tokens"] if chunk["usage"] else tokens
            if chunk["choices"] and chunk["choices"][0]["text"]:
                text.append(chunk["choices"][0]["text"])
                times.append(now)
    return Asked(prompt, "".join(text), sent, tuple(times), tokens)


def _post(server: Address, path: str, body: Any) -> http.client.HTTPConnection:
    link = http.client.HTTPConnection(server.host, server.port, timeout=WAIT_SECONDS)
    link.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return link


def _figures(clients: Sequence[Sequence[Asked]]) -> dict[str, Any]:
    """Of the measured answers of each client."""
    answers = [answer for each in clients for answer in each if answer.times]
    if len(answers) < sum(map(len, clients)):
        raise ValueError("an answer has no text, expected some to time; benchmark another model")
    begin = max(each[0].sent for each in clients)
    end = min(each[-1].times[-1] for each in clients)
    # A chunk may hold several tokens, or parts of a character none: each counts as the mean of its answer.
    tokens = sum(
        answer.tokens / len(answer.times) for answer in answers for at in answer.times if begin <= at <= end
    )
    first = [answer.times[0] - answer.sent for answer in answers]
    between = [gap for answer in answers for gap in np.diff(answer.times)]
    return {
        "tokens_per_second": tokens / (end - begin) if end > begin else None,
        "window_seconds": end - begin,
        "answers": len(answers),
        "tokens": sum(answer.tokens for answer in answers),
        "first_token_seconds": _spread(first),
        "between_tokens_seconds": _spread(between),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"median": float(np.median(seconds)), "p95": float(np.percentile(seconds, 95))}


def _peak_rss(pid: int) -> int | None:
    """Bytes; None where the system does not tell them of another process."""
    try:
        return 1024 * int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        return None


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    rows = [f"{'clients':>8} {'tokens/s':>9} {'first token, s':>20} {'between tokens, ms':>20}"]
    rows.append(f"{'':>8} {'':>9} {'median':>11} {'p95':>8} {'median':>11} {'p95':>8}")
    for count, level in figures["clients"].items():
        first, between = level["first_token_seconds"], level["between_tokens_seconds"]
        speed = "-" if level["tokens_per_second"] is None else f"{level['tokens_per_second']:.1f}"
        gaps = [f"{1e3 * between[name]:.1f}" if between else "-" for name in ("median", "p95")]
        rows.append(
            f"{count:>8} {speed:>9} {first['median']:>11.3f} {first['p95']:>8.3f} {gaps[0]:>11} {gaps[1]:>8}"
        )
    peak = figures["peak_rss_bytes"]
    rows.append(f"peak memory of the server: {'not measured' if peak is None else f'{peak / 1e6:.0f} MB'}")
    rows.append(
        f"{figures['identical_answers']} answers, each with the bytes of the same request alone; prompts of "
        f"{figures['prompt']} tokens, at most {figures['new_tokens']} new ones"
    )
    return "\n".join(rows)
