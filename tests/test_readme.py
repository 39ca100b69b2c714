"""The README works: it is short, its example runs, its commands parse, and the annotated tree is complete."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bitnet_jax.cli.main import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced code blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


@pytest.mark.extended
def test_the_example_runs_as_written() -> None:
    (example,) = blocks("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 10
    assert "assert" in example, "without an assertion this test could not fail"
    exec(compile(example, "README.md", "exec"), {})


def commands() -> list[str]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    return sorted(set(re.findall(r"^bitnet-jax [^#\n]*", text, re.MULTILINE)))


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if not word.startswith("--config.")]
    build_parser().parse_args(words)


def tree() -> list[str]:
    """Paths of the annotated tree: two spaces of indentation per level, a comment after two or more spaces."""
    (text,) = [block for block in blocks("", ARCHITECTURE) if block.startswith("bitnet_jax/")]
    paths: list[str] = []
    parents: list[str] = []
    for line in text.splitlines():
        names = re.match(r"( *)(\S+(?: \S+)*)", line)
        level = len(names.group(1)) // 2 if names else 0
        if names is None or level > len(parents):  # a comment on a separate line
            continue
        entries = names.group(2).split(" ")
        paths += ["".join(parents[:level]) + entry for entry in entries]
        parents[level:] = [entries[-1]]
    return paths


def test_the_tree_lists_existing_paths() -> None:
    paths = tree()
    assert len(paths) > 40
    assert [path for path in paths if not list(ROOT.glob(path))] == []


def test_the_tree_lists_every_module() -> None:
    # `*` stands for the instruction sets of a family of files.
    named = {file.relative_to(ROOT).as_posix() for path in tree() for file in ROOT.glob(path)}
    for root in ("bitnet_jax", "kernels/bitnet_kernels", "kernels/csrc"):
        files = [*(ROOT / root).rglob("*.py"), *(ROOT / root).rglob("*.cc")]
        modules = {file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"}
        assert modules - named == set()


def test_every_number_between_the_markers_has_a_source() -> None:
    """Results come from committed files; the section names them."""
    section = re.search(r"<!-- results:begin.*?-->(.*?)<!-- results:end -->", README, re.DOTALL)
    assert section is not None
    if re.search(r"\d", section.group(1)):
        assert re.search(r"results\.jsonl|summary\.json", section.group(1))
