"""A server that has answered, and now has nothing to do, leaves the machine alone."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="package starlette is not installed; pip install starlette")
pytest.importorskip("uvicorn", reason="package uvicorn is not installed; pip install uvicorn")
pytest.importorskip("prometheus_client", reason="package prometheus-client is not installed")

from tests.bitnet_jax.chat_folders import write_folder

SECONDS = 5


def busy(pid: int) -> float:
    """Seconds of a core that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.extended
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the times of a process are read in /proc")
def test_an_idle_server_uses_less_than_a_hundredth_of_a_core(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "bitnet_jax.cli", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving ")
        link = http.client.HTTPConnection(line.split()[3].removeprefix("http://"), timeout=60)
        body = json.dumps({"model": "model", "prompt": "a", "max_tokens": 20, "stream": True})
        link.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert link.getresponse().read().endswith(b"data: [DONE]\n\n")
        # The connection stays open. What other requests need is still compiled, in a thread.
        end, before, used = time.monotonic() + 120, busy(process.pid), 1.0
        while used >= 0.01 and time.monotonic() < end:
            time.sleep(SECONDS)
            now = busy(process.pid)
            before, used = now, (now - before) / SECONDS
        assert used < 0.01
        link.close()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
