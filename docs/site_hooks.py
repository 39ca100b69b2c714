"""Hooks of mkdocs: the pages of the site that are not in docs/, and the links between pages.

Three kinds of pages come together:

* `docs/*.md`, written by hand;
* Markdown and figures elsewhere in the repository (READMEs of studies and kernels, the changelog), shown under their
  repository path;
* the pages of `generated_pages.py`, and the notebooks.

Links are written for the repository view; `on_page_markdown` turns them into links of the site. A link to the source
of a generated page (SOURCES) becomes a link to that page, and a link to any other source file becomes its path.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

from generated_pages import generated_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "kernels/README.md",
    "experiments/README.md",
    "experiments/studies/*/*.md",
    "experiments/studies/*/*.png",
)
SOURCES = {  # file in the repository -> the page generated from it
    "bitnet_jax/quantization/recipes.py": "recipes.md",
    "bitnet_jax/quantization/ste.py": "methods/gradients.md",
    "kernels/bitnet_kernels/packed.py": "formats.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not Markdown files in docs/."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for uri, text in generated_pages().items():
        files.append(File.generated(config, uri, content=text))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return site_links(markdown, page.file.src_uri, {file.src_uri for file in files})


def site_links(markdown: str, uri: str, pages: Iterable[str]) -> str:
    """Turns links of the repository into links of the site, outside code blocks.

    Args:
      uri: the page that contains the links.
      pages: all pages of the site.
    """
    here = uri if (ROOT / uri).is_file() else f"docs/{uri}"
    pages = set(pages)

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        page = SOURCES.get(path) or re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
        if page in pages:
            return f"{image}[{text}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor or ''})"
        if not image and (ROOT / path).exists():
            return f"{text} (`{path}`)" if text.strip("`") != path else f"`{path}`"
        return match[0]  # mkdocs reports it

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    pattern = r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\((?![a-z]+:)([^)#\s]+)(#[^)]*)?\)"
    return "".join(part if part.startswith("```") else re.sub(pattern, link, part) for part in parts)


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: text, code, and the text that the code printed."""
    parts = [f"*A notebook: `{path.relative_to(ROOT).as_posix()}`.*"]
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", [])))
            parts.append(f"```text\n{text.rstrip()}\n```")
    title = next(i for i, part in enumerate(parts) if part.startswith("# "))
    return "\n\n".join((parts[title], *parts[:title], *parts[title + 1 :])) + "\n"
